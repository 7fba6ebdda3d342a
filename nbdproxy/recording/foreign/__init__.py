"""Recordings in the formats of other programs, read and written.

`formats` tells which one a path is of, `dm_log_writes` and `nbd_trlog` are the formats themselves,
`importing` and `exporting` go between them and a recording of ours. What each format cannot hold
is said in `docs/formats.md`, and by every conversion in the remarks of its `Converted`.
"""

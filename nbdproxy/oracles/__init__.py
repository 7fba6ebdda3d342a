"""Which files are on a block device, and are they whole.

Everything here reads a `ReadableDevice` and nothing else: no root, no kernel, no mount. What it
cannot judge it says so about (verdict *unknown*); it never guesses.
"""

"""Plays what a guest sent into QEMU's own format driver, and records the file that it writes."""

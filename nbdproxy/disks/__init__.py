"""Disks: what can be read and written at an offset, whatever is behind it."""

"""Unnamed scratch files: room for what must not be written to the image (yet).

A scratch file has no name, so a killed process leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile


def scratch_folder() -> str:
    """Return where scratch files lie: in $TMPDIR, else in /var/tmp.

    Unlike /tmp that is on a real disk: what a guest writes without flushing may be larger than
    memory.
    """
    return os.environ.get("TMPDIR") or "/var/tmp"


def open_scratch(size: int = 0) -> int:
    """Return the descriptor of a new unnamed sparse file of `size` bytes."""
    fd, name = tempfile.mkstemp(prefix="nbdproxy-", dir=scratch_folder())
    os.unlink(name)  # noqa: PTH108 - it never had a Path
    os.ftruncate(fd, size)
    return fd


def write_scratch(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data`; a nearly full disk takes a part first and fails only then."""
    wrote = os.pwrite(fd, data, offset)
    while wrote < len(data):
        wrote += os.pwrite(fd, memoryview(data)[wrote:], offset + wrote)

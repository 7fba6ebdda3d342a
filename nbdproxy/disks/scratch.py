"""Unnamed scratch files: room for what must not be written to the image (yet).

A scratch file has no name, so a killed process leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile


def open_scratch(size: int = 0) -> int:
    """Return the descriptor of a new unnamed sparse file of `size` bytes.

    It lies in $TMPDIR, else in /var/tmp, which unlike /tmp is on a real disk: what a guest
    writes without flushing may be larger than memory.
    """
    directory = os.environ.get("TMPDIR") or "/var/tmp"
    fd, name = tempfile.mkstemp(prefix="nbdproxy-", dir=directory)
    os.unlink(name)  # noqa: PTH108 - it never had a Path
    os.ftruncate(fd, size)
    return fd

"""Unnamed scratch files: room for what must not be written to the image (yet).

A scratch file has no name, so a killed process leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from nbdproxy.errors import UsageError
from nbdproxy.private import check_folder


def scratch_folder() -> str:
    """Return where scratch files lie: in $TMPDIR, else in /var/tmp.

    Unlike /tmp that is on a real disk: what a guest writes without flushing may be larger than
    memory. Raises UsageError if it is not there, UnsafeFolderError if others can change it.
    """
    return _checked("/var/tmp")


def temporary_folder() -> str:
    """Return where sockets and small files lie: in $TMPDIR, else in /tmp; raises as above."""
    return _checked("/tmp")


def _checked(otherwise: str) -> str:
    named = os.environ.get("TMPDIR")
    folder = named or otherwise
    try:
        check_folder(Path(folder))
    except OSError as error:
        todo = "make it, or unset TMPDIR" if named else "make it, or set TMPDIR to another folder"
        raise UsageError(
            f"the folder for temporary files, {folder}, cannot be used: {error.strerror}; {todo}"
        ) from None
    return folder


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

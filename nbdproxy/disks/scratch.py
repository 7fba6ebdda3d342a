"""Unnamed scratch files: room for what must not be written to the image (yet).

A scratch file has no name, so a killed process leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from nbdproxy.errors import TemporaryFolderError
from nbdproxy.private import check_folder


def scratch_folder() -> str:
    """Return where scratch files lie: in $TMPDIR, else in /var/tmp.

    Unlike /tmp that is on a real disk: what a guest writes without flushing may be larger than
    memory. Raises TemporaryFolderError if it cannot be used, UnsafeFolderError if others can
    change it.
    """
    return _checked(os.environ.get("TMPDIR") or "/var/tmp")


def temporary_folder() -> str:
    """Return where sockets and small files lie: in $TMPDIR if that is there, else in /tmp.

    Raises as `scratch_folder` does.
    """
    named = os.environ.get("TMPDIR", "")
    return _checked(named if Path(named or "/nowhere").is_dir() else "/tmp")


def _checked(folder: str) -> str:
    try:
        check_folder(Path(folder))
    except OSError as error:
        raise TemporaryFolderError(
            f"the folder for temporary files, {folder}, cannot be used: {error.strerror}; make it, "
            "or set TMPDIR to another folder"
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

"""Folders that somebody else could exchange, and sockets that somebody else listens at."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


def lay_open(folder: Path) -> Path:
    """Let another user have power over a folder: give it away as root, else let all write to it."""
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder.chmod(0o777)
    return folder


@contextmanager
def listening(path: Path, *, give_away: bool = False) -> Iterator[socket.socket]:
    """A Unix socket at `path` that somebody else listens at; that user's own if `give_away`.

    Where this is not root, it is in a folder where somebody else could put one.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        if os.geteuid() == 0:
            if give_away:
                os.chown(path, NOBODY, NOBODY)
            os.seteuid(NOBODY)  # whoever listens is whom the kernel names to those who connect
            try:
                sock.listen()
            finally:
                os.seteuid(0)
        else:
            sock.listen()
            lay_open(path.parent)
        yield sock

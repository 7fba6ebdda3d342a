"""Who is behind a Unix socket that we connect to: the kernel says it, not the peer.

A path in /tmp is whose who binds it first, and a folder's owner can put another socket in its
place. So the path is looked at before, and the listener afterwards (SO_PEERCRED of unix(7)): both
must be those of somebody who could do everything here anyway (`private.is_trusted`), or of a user
who was named.

Not covered: who is behind TCP, which only TLS tells.
"""

from __future__ import annotations

import pwd
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nbdproxy.errors import UnsafeFolderError, UsageError
from nbdproxy.private import check_folder, is_trusted

_CREDENTIALS = struct.Struct("3i")


def user_number(name: str) -> int:
    """Return a user's number by name or number; UsageError if there is no such user."""
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise UsageError(f"there is no user {name!r}; give a name, or a number") from None


class _Connected(Protocol):
    """A connected socket, the standard library's or trio's."""

    def getsockopt(self, level: int, option: int, buflen: int) -> bytes: ...


def peer_of(sock: _Connected) -> tuple[int, int]:
    """Return the process and the user at the other end of a connected Unix socket."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


@dataclass(frozen=True, slots=True)
class TrustedPeers:
    """Whose sockets are believed: ours, root's, and those of the user who was named, if one was.

    advice  what somebody can do whose socket is not
    """

    user: int | None = None
    advice: str = "use a socket in a folder of your own"

    def check_path(self, path: Path) -> None:
        """Raise UnsafeFolderError if others could put a socket of theirs in this one's place.

        Where a user was named only who listens counts: the folder may be that user's. OSError as
        of stat(2).
        """
        if self.user is not None:
            return
        owner = path.lstat().st_uid
        check_folder(path.absolute().parent)
        self._check(owner, path, "belongs to")

    def check_listener(self, sock: _Connected, path: Path | str) -> None:
        """Raise UnsafeFolderError if who listens at `path`, where `sock` is connected, is not."""
        pid, uid = peer_of(sock)
        self._check(uid, path, f"is served by process {pid} of")

    def _check(self, uid: int, path: Path | str, what: str) -> None:
        if uid != self.user and not is_trusted(uid):
            shown = str(path).replace("\0", "@")  # as ss(8) shows abstract names
            raise UnsafeFolderError(
                f"{shown} {what} {_name_of(uid)}, and anybody may have put it there; {self.advice}"
            )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"

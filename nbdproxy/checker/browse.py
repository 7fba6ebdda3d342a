"""`GuestBrowser`: directories and files of a filesystem that the checker's guest has mounted."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from nbdproxy.checker.guest import CheckerGuest
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.browse import BrowsedEntry
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.partitions import Slice

BROKEN = {"EIO", "Unknown system error -74", "Unknown system error -117"}
"""Error codes of a broken structure, as node names them: EIO, EBADMSG and EUCLEAN."""
ABSENT = {"ENOENT", "ENOTDIR", "ELOOP", "ENAMETOOLONG"}
PIECE = 1 << 20
"""Bytes of a file in one answer of the guest."""


class GuestBrowser:
    """A `MountBrowser`; `where` is the mount in the agent's form. Raises GuestError."""

    def __init__(self, guest: CheckerGuest, place: Slice, where: dict[str, object]) -> None:
        self._guest = guest
        self._place = place
        self._where = where

    def find(self, path: bytes) -> BrowsedEntry | None:
        """Return what stands at a path."""
        found = self._ask("find", path)
        if found.get("code") in ABSENT:
            return None
        if "code" in found:
            raise _fault(found["code"])
        return _found(found, path)

    def below(self, folder: BrowsedEntry) -> Iterator[BrowsedEntry | tuple[bytes, FilesystemError]]:
        """Yield what is in a folder."""
        listed = self._ask("list", folder.path)
        for one in sorted(listed["found"], key=lambda one: str(one["path"])):
            path = one["path"].encode("latin-1")
            yield (path, _fault(one["code"])) if "code" in one else _found(one, path)
        if listed["code"] is not None:
            yield folder.path, _fault(listed["code"])

    def target(self, link: BrowsedEntry) -> bytes:
        """Return where a symbolic link points."""
        target: bytes = link.node
        return target

    def pieces(self, file: BrowsedEntry) -> Iterator[tuple[int, bytes]]:
        """Yield the parts of a file that are not zeroes, by ascending offset in bytes."""
        if file.size > self._place.length:
            raise UnsupportedError("it is sparse and larger than its disk")
        for at in range(0, file.size, PIECE):
            length = min(PIECE, file.size - at)
            found = self._ask("piece", file.path, offset=at, length=length)
            if "code" in found:
                raise _fault(found["code"])
            if found["got"] != length:
                raise UnsupportedError("it is shorter than the kernel says")
            if found["data"]:
                yield at, base64.b64decode(found["data"])

    def _ask(self, command: str, path: bytes, **what: int) -> dict[str, Any]:
        return self._guest.ask(command, path=path.decode("latin-1"), place=self._where, **what)


def _found(answer: Any, path: bytes) -> BrowsedEntry:
    target = None if answer["target"] is None else answer["target"].encode("latin-1")
    key = tuple(int(number) for number in answer["key"])
    return BrowsedEntry(
        path, answer["mode"], int(answer["size"]), int(answer["mtime"]), target, key
    )


def _fault(code: str) -> FilesystemError:
    """Return the error of a kernel's error code, as node names it."""
    if code in BROKEN:
        return CorruptError(f"the kernel cannot read it ({code})")
    return UnsupportedError(f"the kernel cannot read it ({code})")

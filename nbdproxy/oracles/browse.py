"""A filesystem of a state as folders and files to be gone through, whoever reads it.

`ShownMount` is one mount of it, by the guest's paths; no link is followed but on the way to a path
that is asked for. Where something cannot be read, CorruptError says that the guest's kernel could
not read it either, UnsupportedError that it cannot be told here.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.check import absolute, candidates, only
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.inode import Inode
from nbdproxy.oracles.filesystems import open_filesystem
from nbdproxy.oracles.mounts import Mount


class FileType(StrEnum):
    """What a name stands for."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"


_NAMES = {
    stat.S_IFCHR: "a device node",
    stat.S_IFBLK: "a device node",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class Found(NamedTuple):
    """One name in a filesystem.

    path      the guest's, in bytes
    mode      type and permissions, as in stat(2)
    mtime_ns  when it was changed last, in nanoseconds since 1970
    node      how `ShownMount` knows it
    key       the same for all names of one thing
    """

    path: bytes
    mode: int
    size: int
    mtime_ns: int
    node: Any
    key: tuple[int, ...]

    @property
    def kind(self) -> FileType:
        """What it is."""
        kinds = {
            stat.S_IFREG: FileType.FILE,
            stat.S_IFDIR: FileType.FOLDER,
            stat.S_IFLNK: FileType.LINK,
        }
        return kinds.get(stat.S_IFMT(self.mode), FileType.OTHER)

    @property
    def what(self) -> str:
        """What it is, in words, if it is of no kind that can be written to a folder."""
        return _NAMES.get(stat.S_IFMT(self.mode), "of an unknown type")


class ShownMount(Protocol):
    """One mount of a state."""

    def find(self, path: bytes) -> Found | None:
        """Return what stands at a guest's absolute path, a last link not followed; None if nothing.

        Raises CorruptError or UnsupportedError.
        """
        ...

    def below(self, folder: Found) -> Iterator[Found | tuple[bytes, FilesystemError]]:
        """Yield what is in a folder, what other mounts cover left out; or a path and its fault.

        A fault of the folder's own path is that names may be missing.
        """
        ...

    def target(self, link: Found) -> bytes:
        """Return where a symbolic link points."""
        ...

    def pieces(self, file: Found) -> Iterator[tuple[int, bytes]]:
        """Yield what of a file may be more than zeroes, ascending, each with its offset."""
        ...


class NotMountedError(FilesystemError):
    """A kernel does not mount the filesystem: all of its files are lost."""


class ShownExt:
    """Satisfies `ShownMount` for what is read here, the ext family."""

    def __init__(self, device: ReadableDevice, mount: Mount) -> None:
        """Raise FilesystemError if there is nothing that can be read."""
        place = only(candidates(device, mount.partition))
        filesystem = open_filesystem(place.device, mount)
        assert isinstance(filesystem, Filesystem)
        self._filesystem = filesystem
        self._covered = {absolute(point) for point in mount.covered}

    def find(self, path: bytes) -> Found | None:
        """Return what stands at a path."""
        node = self._filesystem.lookup(path, follow_last=False)
        return None if node is None else _found(path, node)

    def below(self, folder: Found) -> Iterator[Found | tuple[bytes, FilesystemError]]:
        """Yield what is in a folder."""
        try:
            names = self._filesystem.listing(folder.node)
        except (CorruptError, UnsupportedError) as error:
            yield folder.path, error
            return
        for name, number in sorted(names.names.items()):
            path = folder.path.rstrip(b"/") + b"/" + name
            if path in self._covered:
                continue
            try:
                if self._filesystem.child(folder.node, name) != number:
                    raise UnsupportedError("the folder's index does not lead to it")
                yield _found(path, self._filesystem.inode(number))
            except (CorruptError, UnsupportedError) as error:
                yield path, error
        if not names.is_complete:
            yield folder.path, CorruptError("a part of the folder is broken, with the names in it")

    def target(self, link: Found) -> bytes:
        """Return where a symbolic link points."""
        return self._filesystem.symlink_target(link.node)

    def pieces(self, file: Found) -> Iterator[tuple[int, bytes]]:
        """Yield what of a file is stored."""
        return self._filesystem.pieces(file.node)


def _found(path: bytes, node: Inode) -> Found:
    return Found(path, node.mode, node.size, node.mtime_ns, node, (node.number,))

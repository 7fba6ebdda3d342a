"""Directories and files of a mounted crash state, independent of the oracle that reads them.

A `MountBrowser` shows one mount, by the guest's paths; no symbolic link is followed but in the
directories of a path that is looked up. Where something cannot be read, CorruptError says that the
guest's kernel could not read it either, UnsupportedError that only a kernel could.
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
    """The type of a directory entry, as far as `extract` distinguishes it."""

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


class BrowsedEntry(NamedTuple):
    """One path of a mount.

    path      the guest's path
    mode      type and permissions, as in stat(2)
    size      in bytes
    mtime_ns  when its content was changed last, in nanoseconds since 1970
    node      a handle of the `MountBrowser` that returned it
    key       identifies the inode: equal for all hard links
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
        """What it is, in words, if it is of no type that `extract` can write."""
        return _NAMES.get(stat.S_IFMT(self.mode), "of an unknown type")


class MountBrowser(Protocol):
    """One mount of a state."""

    def find(self, path: bytes) -> BrowsedEntry | None:
        """Return what is at an absolute path, a link at its end not followed; None if nothing.

        Raises CorruptError or UnsupportedError.
        """
        ...

    def below(self, folder: BrowsedEntry) -> Iterator[BrowsedEntry | tuple[bytes, FilesystemError]]:
        """Yield the entries of a directory, without mount points; or a path and its error.

        An error for the directory's own path means that entries may be missing.
        """
        ...

    def target(self, link: BrowsedEntry) -> bytes:
        """Return where a symbolic link points."""
        ...

    def pieces(self, file: BrowsedEntry) -> Iterator[tuple[int, bytes]]:
        """Yield the parts of a file that may be other than zeroes, by ascending offset in bytes."""
        ...


class NotMountedError(FilesystemError):
    """The kernel refuses to mount the filesystem: all of its files are lost."""


class ExtBrowser:
    """A `MountBrowser` of an ext2, ext3 or ext4 filesystem, read without a kernel."""

    def __init__(self, device: ReadableDevice, mount: Mount) -> None:
        """Raise FilesystemError if there is nothing that can be read."""
        place = only(candidates(device, mount.partition))
        filesystem = open_filesystem(place.device, mount)
        assert isinstance(filesystem, Filesystem)
        self._filesystem = filesystem
        self._covered = {absolute(point) for point in mount.covered}

    def find(self, path: bytes) -> BrowsedEntry | None:
        """Return what stands at a path."""
        node = self._filesystem.lookup(path, follow_last=False)
        return None if node is None else _found(path, node)

    def below(self, folder: BrowsedEntry) -> Iterator[BrowsedEntry | tuple[bytes, FilesystemError]]:
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

    def target(self, link: BrowsedEntry) -> bytes:
        """Return where a symbolic link points."""
        return self._filesystem.symlink_target(link.node)

    def pieces(self, file: BrowsedEntry) -> Iterator[tuple[int, bytes]]:
        """Yield what of a file is stored."""
        return self._filesystem.pieces(file.node)


def _found(path: bytes, node: Inode) -> BrowsedEntry:
    return BrowsedEntry(path, node.mode, node.size, node.mtime_ns, node, (node.number,))

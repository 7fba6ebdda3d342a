"""Copies files and directories of a crash state into a directory of this machine.

Copied are content with its holes, permissions, modification times, and symbolic links, which are
never followed. Whatever a broken or forged disk holds, nothing is written outside the directory:
each name is created new, in directories that were opened without following links. Left out, each
with a message: device nodes, FIFOs and sockets. Not kept are owners, extended attributes, set-uid
and set-gid bits, and hard links; the owner may always read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nbdproxy.disks.copying import write_blocks
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, UsageError
from nbdproxy.oracles.blank import what_is_blank
from nbdproxy.oracles.browse import BrowsedEntry, FileType, MountBrowser, NotMountedError
from nbdproxy.oracles.check import absolute, shown
from nbdproxy.oracles.ext4.faults import CorruptError
from nbdproxy.oracles.mounts import Tree, is_below
from nbdproxy.oracles.oracle import Oracle

DEPTH_MAX = 200
"""Directories in directories; deeper only a directory goes that contains itself."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Errors that concern the whole directory, and not one name."""


@dataclass
class Extracted:
    """What was written, and what was not: the guest's paths, each with the reason.

    written   files, directories and symbolic links
    lost      what the guest's kernel could not read either, or what is not there
    doubtful  what only a kernel could read, or what cannot be written here
    skipped   what is left out on purpose
    refused   why a kernel does not mount a filesystem, or that it is blank: all of it is lost
    """

    written: list[BrowsedEntry] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    doubtful: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    refused: str | None = None

    def count(self, kind: FileType) -> int:
        """Return how many of a kind were written."""
        return sum(one.kind is kind for one in self.written)

    @property
    def size(self) -> int:
        """The bytes of all files together, holes included."""
        return sum(one.size for one in self.written if one.kind is FileType.FILE)

    def note(self, path: bytes | str, error: Exception) -> None:
        """Enter what could not be read, as lost or as doubtful."""
        path = path if isinstance(path, str) else shown(path)
        if isinstance(error, NotMountedError):
            self.refused = str(error)
        is_lost = isinstance(error, (CorruptError, NotMountedError))
        (self.lost if is_lost else self.doubtful).append((path, str(error)))


def extract(
    oracle: Oracle,
    device: ReadableDevice,
    tree: Tree,
    paths: Sequence[str],
    folder: Path,
    *,
    tell: Callable[[Extracted], None] = lambda _: None,
) -> Extracted:
    """Write what is at some of the guest's paths into a directory, which is empty.

    `tell` is called after each file. Raises UsageError if the directory cannot be written, with a
    part of the files in it.
    """
    found = Extracted()
    wanted = [shown(absolute(os.path.normpath(path))) for path in dict.fromkeys(paths)]
    fd = os.open(folder, _FOLDER)
    try:
        writer = _Writer(fd, found, tell, tree.unplaced)
        for mount in tree.mounts:
            mine = [path for path in wanted if mount.holds(path) or is_below(mount.point, path)]
            if not mine:
                continue
            try:
                with oracle.browse(device, mount=mount) as view:
                    for path in mine:
                        # What is below another path is written with that.
                        comes = any(is_below(path, one) for one in mine if one != path)
                        point = path if mount.holds(path) else mount.point
                        writer.take(view, point, only_look=comes)
                    writer.finish()
            except FilesystemError as error:
                blank = what_is_blank(device, mount.partition)
                found.note(mount.point, error if blank is None else NotMountedError(blank))
        _note_away(found, tree, wanted)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}; what is there is not all: "
            f"make room, or name another folder"
        ) from None
    finally:
        os.close(fd)
    return found


def _note_away(found: Extracted, tree: Tree, wanted: Sequence[str]) -> None:
    """Enter the paths and mount points that are on filesystems which cannot be read."""
    for path in wanted:
        if isinstance(why := tree.of(path), str):
            found.doubtful.append((path, why))
        for point, why in tree.unreadable.items():
            if point != path and is_below(point, path):
                is_known = why in tree.diskless
                (found.skipped if is_known else found.doubtful).append((point, why))


class _Writer:
    def __init__(
        self, fd: int, found: Extracted, tell: Callable[[Extracted], None], unplaced: str
    ) -> None:
        self._fd = fd
        self._loose = unplaced
        self._found = found
        self._tell = tell
        self._made: list[BrowsedEntry] = []
        self._met: set[tuple[int, ...]] = set()

    def take(self, view: MountBrowser, path: str, *, only_look: bool) -> None:
        """Write what is at a path and below; with `only_look` only note if it is missing."""
        try:
            top = view.find(absolute(path))
        except FilesystemError as error:
            self._found.note(path, error)
            return
        if top is None and self._loose:
            why = f"it is not there, but perhaps in what cannot be read here: {self._loose}"
            self._found.doubtful.append((path, why))
            return
        if top is None:
            self._found.lost.append((path, "it is not there"))
            return
        if only_look:
            return
        self._met = set()
        self._make_way(top.path)
        todo = [top]
        while todo:
            one = todo.pop()
            if self._write(view, one) and one.kind is FileType.FOLDER:
                todo += reversed(list(self._below(view, one)))

    def finish(self) -> None:
        """Give the folders their permissions and times, now that nothing is written to them."""
        while self._made:
            one = self._made.pop()
            with self._opened(_names(one.path)) as fd:
                os.fchmod(fd, one.mode & 0o777 | 0o700)
                os.utime(fd, ns=(one.mtime_ns, one.mtime_ns))

    def _below(self, view: MountBrowser, folder: BrowsedEntry) -> Iterator[BrowsedEntry]:
        if folder.key in self._met or len(_names(folder.path)) > DEPTH_MAX:
            self._found.doubtful.append((shown(folder.path), "it is a folder within itself"))
            return
        self._met.add(folder.key)
        for one in view.below(folder):
            if isinstance(one, BrowsedEntry):
                name = one.path[len(folder.path.rstrip(b"/")) + 1 :]
                if name in {b"", b".", b".."} or b"/" in name or b"\0" in name:
                    broken = CorruptError(f"there is a name {shown(name)!r}, which cannot be")
                    self._found.note(folder.path, broken)
                    continue
                yield one
            else:
                self._found.note(*one)

    def _write(self, view: MountBrowser, one: BrowsedEntry) -> bool:
        """Write one name; tell whether it is there."""
        if one.kind is FileType.OTHER:
            self._found.skipped.append((shown(one.path), f"it is {one.what}"))
            return False
        *way, name = _names(one.path) or [b"."]
        try:
            with self._opened(way) as fd:
                if one.kind is FileType.FILE:
                    self._write_file(view, one, name, fd)
                elif one.kind is FileType.LINK:
                    os.symlink(view.target(one), name, dir_fd=fd)
                    os.utime(
                        name, ns=(one.mtime_ns, one.mtime_ns), dir_fd=fd, follow_symlinks=False
                    )
                else:
                    self._make_folder(name, fd)
                    self._made.append(one)
        except FilesystemError as error:
            self._found.note(one.path, error)
            return False
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _FATAL:
                raise
            why = error.strerror if isinstance(error, OSError) else error
            self._found.doubtful.append((shown(one.path), f"it cannot be written here: {why}"))
            return False
        self._found.written.append(one)
        self._tell(self._found)
        return True

    def _write_file(self, view: MountBrowser, one: BrowsedEntry, name: bytes, folder: int) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=folder)
        try:
            os.ftruncate(fd, one.size)
            for offset, data in view.pieces(one):
                write_blocks(fd, data, offset)
            os.fchmod(fd, one.mode & 0o777 | 0o400)
            os.utime(fd, ns=(one.mtime_ns, one.mtime_ns))
        except BaseException:
            os.unlink(name, dir_fd=folder)  # no part of a file is left
            raise
        finally:
            os.close(fd)

    def _make_way(self, path: bytes) -> None:
        """Make the parent directories of a path."""
        names = _names(path)[:-1]
        for length, name in enumerate(names):
            with self._opened(names[:length]) as fd:
                self._make_folder(name, fd)

    @staticmethod
    def _make_folder(name: bytes, fd: int) -> None:
        """Make a folder unless it is there, which one above what was asked for may be."""
        try:
            os.mkdir(name, 0o700, dir_fd=fd)
        except FileExistsError:
            os.close(os.open(name, _FOLDER, dir_fd=fd))

    @contextmanager
    def _opened(self, names: Sequence[bytes]) -> Iterator[int]:
        """Yield a folder below ours, to which no link leads."""
        fd = os.dup(self._fd)
        try:
            for name in names:
                below = os.open(name, _FOLDER, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name]

"""NTFS, read by The Sleuth Kit (pytsk3): an optional extra, `nbdproxy[ntfs]`.

Guarantees: it is read only where its own system left nothing to replay: its dirty flag is clear and
its log closed. Compressed and encrypted files are unknown. A file whose clusters end before its
size is corrupt. Names are compared as they are, and then without regard to case.

Not covered: links (reparse points). FAT is not read this way: on torn states the library told
another story than the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.ext4.faults import CorruptError, RefusedError, UnsupportedError

CHUNK = 1 << 20
_VOLUME, _LOG = 3, 2  # entries of NTFS's master file table
_VOLUME_INFORMATION = 0x70
_DIRTY = 0x1
_RESTART_PAGE = 4096
_CLOSED = 0x2
_NO_CLIENT = 0xFFFF
_ENCRYPTED, _COMPRESSED = 0x10, 0x20  # of the library's own flags of an attribute
_OWN = 24  # below this number files are NTFS's tables


@dataclass(frozen=True, slots=True)
class Node:
    """A file or folder; `mode` is 0, as there are no permissions like those of Unix."""

    number: int
    size: int
    is_regular: bool
    is_directory: bool
    handle: Any
    is_symlink: bool = False
    mode: int = 0


class NtfsFilesystem:
    """A filesystem on `device`, read-only; nothing is kept between two of them."""

    def __init__(self, device: ReadableDevice) -> None:
        """Raises FilesystemError if it cannot be read, or has something to replay."""
        try:
            import pytsk3  # noqa: PLC0415 - an optional extra
        except ImportError:
            raise FilesystemError(
                "NTFS is read by a library that is not installed; run: pip install 'nbdproxy[ntfs]'"
            ) from None
        self.device = device
        self._tsk = pytsk3
        try:
            self._fs = pytsk3.FS_Info(_image(pytsk3, device))
            self._check_log()
        except OSError as error:
            raise RefusedError(f"the filesystem cannot be read: {_short(error)}") from None

    def lookup(self, path: bytes, *, follow_last: bool = True) -> Node | None:  # noqa: ARG002
        """Return what a path leads to; None if nothing. Raises CorruptError."""
        node: Node | None = self._node(self._fs.open_meta(self._fs.info.root_inum))
        for name in path.split(b"/"):
            if name in {b"", b"."}:
                continue
            if node is None or not node.is_directory:
                return None
            below = dict(self._names(node))
            exact = below.get(name)
            wanted = name.decode("utf-8", "surrogateescape").casefold()
            node = exact or next(
                (
                    other
                    for other_name, other in below.items()
                    if other_name.decode("utf-8", "surrogateescape").casefold() == wanted
                ),
                None,
            )
        return node

    def walk(self, under: bytes = b"/") -> Iterator[tuple[bytes, Node]]:
        """Yield path and node of every regular file below a folder, in the order of names."""
        top = self.lookup(under)
        prefix = under.rstrip(b"/")
        if top is not None and top.is_regular:
            yield prefix, top
        todo = [(prefix, top)] if top is not None and top.is_directory else []
        seen = {node.number for _, node in todo}
        while todo:
            path, node = todo.pop()
            below = []
            for name, child in sorted(self._names(node), key=lambda found: found[0]):
                if child.is_regular:
                    yield path + b"/" + name, child
                elif child.is_directory and child.number not in seen:
                    seen.add(child.number)
                    below.append((path + b"/" + name, child))
            todo += reversed(below)

    def chunks(self, node: Node) -> Iterator[bytes]:
        """Yield a file's content; raises CorruptError where its clusters end too early."""
        self._check_content(node)
        at = 0
        while at < node.size:
            wanted = min(CHUNK, node.size - at)
            try:
                found = node.handle.read_random(at, wanted)
            except OSError as error:
                raise CorruptError(f"file {node.number} cannot be read: {_short(error)}") from None
            if len(found) < wanted:
                raise CorruptError(f"file {node.number} is shorter on the disk than its size")
            yield found
            at += wanted

    def symlink_target(self, node: Node) -> bytes:
        """Raise UnsupportedError: there are no links that could be read."""
        raise UnsupportedError(f"file {node.number} is no link that is read here")

    def _names(self, node: Node) -> list[tuple[bytes, Node]]:
        found = []
        try:
            for entry in node.handle.as_directory():
                name = entry.info.name.name
                is_there = entry.info.name.flags & self._tsk.TSK_FS_NAME_FLAG_ALLOC
                if name in {b".", b".."} or not is_there or entry.info.meta is None:
                    continue
                child = self._node(entry)
                if not (name.startswith(b"$") and child.number < _OWN):
                    found.append((name, child))
        except OSError as error:
            raise CorruptError(f"folder {node.number} cannot be read: {_short(error)}") from None
        return found

    def _node(self, entry: Any) -> Node:
        meta = entry.info.meta
        is_regular = meta.type == self._tsk.TSK_FS_META_TYPE_REG
        is_directory = meta.type == self._tsk.TSK_FS_META_TYPE_DIR
        return Node(meta.addr, meta.size, is_regular, is_directory, entry)

    def _check_content(self, node: Node) -> None:
        for attribute in node.handle:
            if int(attribute.info.flags) & (_COMPRESSED | _ENCRYPTED):
                raise UnsupportedError(f"file {node.number} is compressed or encrypted")

    def _check_log(self) -> None:
        """Raise RefusedError unless NTFS was left with nothing to replay."""
        volume = self._fs.open_meta(_VOLUME)
        flags = None
        for attribute in volume:
            if int(attribute.info.type) == _VOLUME_INFORMATION:
                raw = volume.read_random(0, 12, attribute.info.type, attribute.info.id)
                (flags,) = struct.unpack_from("<H", raw, 10)
        log = self._fs.open_meta(_LOG).read_random(0, 2 * _RESTART_PAGE)
        pages = (log[:_RESTART_PAGE], log[_RESTART_PAGE:])
        if flags is None or flags & _DIRTY or not all(map(_is_closed, pages)):
            raise RefusedError(
                "the NTFS was not closed in order, and its log is not replayed here; "
                "mount it in the system that it belongs to"
            )


def _is_closed(page: bytes) -> bool:
    """Tell whether a page of NTFS's log says that nobody uses it; one never written is all ones."""
    if page[:4] == b"\xff\xff\xff\xff":
        return True
    if page[:4] != b"RSTR":
        return False
    (area,) = struct.unpack_from("<H", page, 0x18)
    if area + 16 > len(page):
        return False
    in_use, flags = struct.unpack_from("<HH", page, area + 12)
    return bool(in_use == _NO_CLIENT or flags & _CLOSED)


def _image(tsk: Any, device: ReadableDevice) -> Any:
    class Image(tsk.Img_Info):  # type: ignore[misc]
        """The device, as the library wants it."""

        def __init__(self) -> None:
            super().__init__(url="", type=tsk.TSK_IMG_TYPE_EXTERNAL)

        def close(self) -> None:
            """Do nothing: the device belongs to whoever opened it."""

        def read(self, offset: int, length: int) -> bytes:
            """Return bytes, fewer at the end of the device."""
            return device.pread(offset, max(0, min(length, device.size - offset)))

        def get_size(self) -> int:
            """Return the device's size."""
            return device.size

    return Image()


def _short(error: OSError) -> str:
    """Return the library's last words, without the trail of its functions."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"

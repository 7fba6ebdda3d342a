"""`Filesystem`: names, inodes and content of an ext2, ext3 or ext4 filesystem, read-only.

Paths are the guest's, by the filesystem's mount point (`nbdproxy.oracles.mounts`), which is `/` by
default.

The journal is not replayed here: `mounted.open_filesystem` does that first. The orphan list needs
no handling: orphans without links have no name, and those with links already have the size that
they are to be truncated to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.ext4 import directory, inode, superblock
from nbdproxy.oracles.ext4.directory import Directory
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.inode import Inode, InodeFlag
from nbdproxy.oracles.ext4.lookup import DirectoryLookup, ParsedBlocks
from nbdproxy.oracles.ext4.mapping import BlockRun, BlockTree, ReadBlock
from nbdproxy.oracles.mounts import ONLY, Mount

ROOT = 2
CHUNK = 1 << 20
HOLES_MAX = 4 << 30
"""Bytes of holes in a file that are read as zeroes, which takes some seconds."""
CACHED_BLOCKS_MAX = 4096
CACHED_INODES_MAX = 65536
LINKS_MAX = 40  # symbolic links the kernel follows in one path
STEPS_MAX = 500
"""Names that are looked up for one path, those of its links included. The kernel has no such limit,
but forty links of 4 KiB would take seconds for each file."""
PATH_MAX = 4096  # bytes of a path that a kernel takes, its zero byte included
_ZEROES = bytes(CHUNK)


class Filesystem:
    """A filesystem as it is on `device`, without regard to its journal."""

    def __init__(self, device: ReadableDevice, mount: Mount = ONLY) -> None:
        """Read superblock and group descriptors; `mount` is its place in the guest's tree.

        Raises NoFilesystemError, or RefusedError for what a kernel would not mount.
        """
        self.device = device
        self.superblock = superblock.parse(device)
        self.tables, self._fixed = superblock.groups(device, self.superblock)
        self._blocks: dict[int, bytes] = {}
        self._inodes: dict[int, Inode] = {}
        self._directories: dict[int, DirectoryLookup] = {}
        self._parsed: ParsedBlocks = {}
        self._point = _names(mount.point)
        self._root = _names(mount.root)
        self._covered = {tuple(_names(point)) for point in mount.covered}

    def block(self, number: int) -> bytes:
        """Return one block of metadata, from a cache if it was read before."""
        found = self._blocks.get(number)
        if found is None:
            if len(self._blocks) >= CACHED_BLOCKS_MAX:
                self._blocks.clear()
            size = self.superblock.block_size
            found = self._blocks[number] = self.device.pread(number * size, size)
        return found

    def inode_offset(self, number: int) -> int:
        """Return the offset of an inode on the disk, in bytes."""
        sb = self.superblock
        if not 1 <= number <= sb.inodes:
            raise CorruptError(f"a name refers to inode {number}, which does not exist")
        group, index = divmod(number - 1, sb.inodes_per_group)
        return self.tables[group] * sb.block_size + index * sb.inode_size

    def inode(self, number: int) -> Inode:
        """Return one inode; raises CorruptError if the kernel could not read it.

        Inodes are cached.
        """
        found = self._inodes.get(number)
        if found is None:
            if len(self._inodes) >= CACHED_INODES_MAX:
                self._inodes.clear()
            found = self._inodes[number] = self._read_inode(number)
        return found

    def tree(self, node: Inode, read_block: ReadBlock) -> BlockTree:
        """Return a file's block map; `read_block` reads its extent or indirect blocks."""
        return BlockTree(self.superblock, self._fixed, node, read_block)

    def runs(self, node: Inode) -> list[BlockRun]:
        """Return where the written blocks of a file are; empty for content in the inode."""
        if node.flags & InodeFlag.INLINE_DATA:
            return []
        return self.tree(node, self.block).runs()

    def chunks(self, node: Inode) -> Iterator[bytes]:
        """Yield a file's content, all `node.size` bytes of it, in pieces of at most 1 MiB.

        Raises UnsupportedError for one that `is_endless`.
        """
        if self.is_endless(node):
            raise UnsupportedError(
                f"inode {node.number} is sparse, and its {node.size} bytes are too many to be "
                "read; leave it out with --exclude"
            )
        at = 0
        for start, data in self.pieces(node):
            yield from _zeroes(start - at)
            yield data
            at = start + len(data)
        yield from _zeroes(node.size - at)

    def is_endless(self, node: Inode) -> bool:
        """Tell whether a file has more than HOLES_MAX bytes of holes, too many to be read."""
        if node.size <= HOLES_MAX:
            return False
        return node.size - self.blocks_in(node) * self.superblock.block_size > HOLES_MAX

    def blocks_in(self, node: Inode) -> int:
        """Return how many written blocks a file or directory has."""
        return sum(run.blocks for run in self.runs(node))

    def pieces(self, node: Inode) -> Iterator[tuple[int, bytes]]:
        """Yield the stored parts of a file's content with their offsets; all else is zeroes."""
        if node.flags & InodeFlag.ENCRYPT:
            raise UnsupportedError(f"inode {node.number} is encrypted; it needs its key")
        if node.flags & InodeFlag.VERITY and node.is_regular:
            raise UnsupportedError(f"inode {node.number} has fs-verity, which is not verified here")
        if node.flags & InodeFlag.INLINE_DATA:
            yield 0, b"".join(inode.inline_parts(node))[: node.size]
            return
        size = self.superblock.block_size
        for run in self.runs(node):
            end = min((run.logical + run.blocks) * size, node.size)
            shift = (run.physical - run.logical) * size
            for at in range(run.logical * size, end, CHUNK):
                yield at, self.device.pread(at + shift, min(CHUNK, end - at))

    def listing(self, node: Inode) -> Directory:
        """Return all names in a directory, also those that a kernel's lookup does not find."""
        return self._list(node)

    def child(self, node: Inode, name: bytes) -> int | None:
        """Return the number of the inode that a directory has under a name; None if none.

        Raises CorruptError where the kernel answers with an error, UnsupportedError where its
        answer cannot be told.
        """
        number = self.directory_lookup(node).find(name)
        if number is None:
            return None
        sb = self.superblock
        is_valid = sb.first_inode <= number <= sb.inodes and number not in sb.hidden_inodes
        if number == node.number or not (is_valid or number == ROOT):
            raise CorruptError(f"a name refers to inode {number}, which none may have")
        return number

    def directory_lookup(self, node: Inode) -> DirectoryLookup:
        """Return the lookup of a directory's names, cached."""
        found = self._directories.get(node.number)
        if found is None:
            if len(self._directories) >= CACHED_INODES_MAX:
                self._directories.clear()
            found = DirectoryLookup(self.superblock, node, self.block, self.tree, self._parsed)
            self._directories[node.number] = found
        return found

    def lookup(self, path: bytes, *, follow_last: bool = True) -> Inode | None:
        """Resolve a guest's absolute path, following links; None if there is nothing.

        Unless `follow_last`, a link that the path itself names is returned and not followed.
        Raises CorruptError if a directory or inode of the path cannot be read, UnsupportedError if
        one is encrypted, or if the path leads into another filesystem.
        """
        top = self._top()
        if top is None:
            return None
        todo = self._names_below_point(path)
        path_nodes, names = {top.number: top}, list(self._point)
        here = top
        links = 0
        for name in _pop_names(todo):
            if name in {b"", b"."}:
                continue
            if name == b"..":
                names, here = self._names_above(names), _parent(path_nodes)
                continue
            if not here.is_directory:
                return None
            if (*names, name) in self._covered:
                raise _leaves_mount([*names, name])
            number = self.child(here, name)
            if number is None:
                return None
            node = self.inode(number)
            if not node.is_symlink or (not todo and not follow_last):
                if node.is_directory and number in path_nodes:
                    return None  # it contains itself: the kernel does not go there
                here = path_nodes[number] = node
                names.append(name)
                continue
            links += 1
            if links > LINKS_MAX:
                return None
            target = self.symlink_target(node)
            if target.startswith(b"/"):
                path_nodes, names, here = {top.number: top}, list(self._point), top
                todo += self._names_below_point(target)
            else:
                todo += target.split(b"/")[::-1]
        return here

    def walk(
        self,
        under: bytes = b"/",
        broken: list[bytes] | None = None,
        without: Callable[[bytes], bool] = lambda _: False,
    ) -> Iterator[tuple[bytes, Inode]]:
        """Yield path and inode of every regular file and symbolic link, in the order of names.

        Hard links appear under each of their names; symbolic links are not followed, but in the
        path `under`. Raises CorruptError, with the path, at what cannot be read; with a list
        `broken` the path is appended to it instead. Paths that `without` matches are skipped with
        all that is below them.
        """
        wanted = _split(under)
        if self._point[: len(wanted)] == wanted:
            top, under = self._top(), b"".join(b"/" + name for name in self._point)
        else:
            top = self.lookup(under)
        if top is None:
            return
        prefix = under.rstrip(b"/")
        if top.is_regular:
            yield prefix, top
        todo = [(prefix, top)] if top.is_directory else []
        seen = {top.number}
        left = self.superblock.blocks
        names = self.superblock.names_max
        while todo:
            path, node = todo.pop()
            left -= self._blocks_of_directory(node)
            if left < 0:
                raise UnsupportedError(f"{_text(path)}: directories use the same blocks")
            below = []
            for full, number, child in self._children(path, node, broken, without):
                names -= 1
                if names < 0:
                    raise UnsupportedError(f"{_text(path)}: more names than are read here")
                if child.is_regular or child.is_symlink:
                    yield full, child
                elif child.is_directory and number not in seen:
                    seen.add(number)
                    below.append((full, child))
            todo += reversed(below)

    def symlink_target(self, node: Inode) -> bytes:
        """Return where a symbolic link points to."""
        if node.flags & InodeFlag.ENCRYPT:
            raise UnsupportedError(f"inode {node.number} is encrypted; it needs its key")
        if node.is_fast_symlink:
            return node.block_map[: min(node.size, len(node.block_map) - 1)].split(b"\0")[0]
        if node.flags & InodeFlag.INLINE_DATA:
            return b"".join(inode.inline_parts(node))[: node.size].split(b"\0")[0]
        first = self.tree(node, self.block).find(0)
        if first is None:
            raise CorruptError(f"inode {node.number}, a symbolic link, has no content")
        content = self.block(first)
        return content[: min(node.size, len(content) - 1)].split(b"\0")[0]

    def _top(self) -> Inode | None:
        """Return the directory that is mounted, `Mount.root`; None if it is not there."""
        node = self.inode(ROOT)
        for name in self._root:
            number = self.child(node, name) if node.is_directory else None
            if number is None:
                return None
            node = self.inode(number)
            if node.is_symlink:
                raise UnsupportedError(f"{_text(name)}, which is mounted, is a symbolic link")
        return node

    def _names_above(self, names: list[bytes]) -> list[bytes]:
        """Return the names of the directory above, as the guest sees it."""
        if names and names == self._point:
            raise _leaves_mount(names[:-1])
        return names[:-1]

    def _names_below_point(self, path: bytes) -> list[bytes]:
        """Return the names of an absolute path below the mount point, the last one first."""
        names = path.split(b"/")
        for wanted in self._point:
            while names and names[0] in {b"", b"."}:
                del names[0]
            if not names or names.pop(0) != wanted:
                raise _leaves_mount(_split(path))
        return names[::-1]

    def _read_inode(self, number: int) -> Inode:
        sb = self.superblock
        block, start = divmod(self.inode_offset(number), sb.block_size)
        if block >= sb.blocks:
            raise CorruptError(f"inode {number} is outside the disk")
        node = inode.parse(sb, number, self.block(block)[start : start + sb.inode_size])
        if node.has_block_map:
            self.tree(node, self.block).check()
        return node

    def _children(
        self,
        path: bytes,
        node: Inode,
        broken: list[bytes] | None,
        without: Callable[[bytes], bool],
    ) -> Iterator[tuple[bytes, int, Inode]]:
        """Yield path, number and inode of a directory's entries, without other mounts' points."""
        try:
            names = sorted(self._found(path, node).items())
        except (CorruptError, UnsupportedError):
            if broken is None:
                raise
            broken.append(path)
            return
        for name, number in names:
            full = path + b"/" + name
            if without(full):
                continue
            if len(full) >= PATH_MAX:
                error = UnsupportedError(
                    f"{_text(path)}: paths below it are longer than any kernel takes"
                )
                if broken is None:
                    raise error
                broken.append(path)
                return
            if self._covered and tuple(_split(full)) in self._covered:
                continue
            try:
                child = self._named(full, number)
            except (CorruptError, UnsupportedError):
                if broken is None:
                    raise
                broken.append(full)
                continue
            yield full, number, child

    def _named(self, path: bytes, number: int) -> Inode:
        try:
            return self.inode(number)
        except CorruptError as error:
            raise CorruptError(f"{_text(path)}: {error}") from error

    def _blocks_of_directory(self, node: Inode) -> int:
        try:
            return self.blocks_in(node)
        except (CorruptError, UnsupportedError):
            return 0  # it is not listed either

    def _found(self, path: bytes, node: Inode) -> dict[bytes, int]:
        """Return the names in a directory; raises where they are not the ones that are found."""
        listed = self._list(node)
        if not listed.is_complete:
            raise CorruptError(f"{_text(path)}: the directory is broken")
        directory_lookup = self.directory_lookup(node)
        if not listed.is_plain or any(
            directory_lookup.find(name) != number for name, number in listed.names.items()
        ):
            raise UnsupportedError(f"{_text(path)}: the directory has names that are not found")
        return listed.names

    def _list(self, node: Inode) -> Directory:
        if node.flags & InodeFlag.ENCRYPT:
            raise UnsupportedError(f"inode {node.number} is encrypted; it needs its key")
        if node.flags & InodeFlag.INLINE_DATA:
            first, second = inode.inline_parts(node)
            return directory.parse_inline(self.superblock, [first[4:], second])
        return directory.parse(self.superblock, node, self._directory_blocks(node))

    def _directory_blocks(self, node: Inode) -> Iterator[tuple[int, bytes]]:
        # A hole in a directory holds no names; the kernel skips it.
        size = self.superblock.block_size
        end = node.size // size
        for run in self.runs(node):
            for index in range(run.logical, min(run.logical + run.blocks, end)):
                yield index, self.block(run.physical + index - run.logical)


def _pop_names(todo: list[bytes]) -> Iterator[bytes]:
    """Pop names from the end of `todo`, to which the caller may append meanwhile."""
    for _ in range(STEPS_MAX):
        if not todo:
            return
        yield todo.pop()
    if todo:
        raise UnsupportedError(f"more than {STEPS_MAX} names lead there, by links")


def _parent(path_nodes: dict[int, Inode]) -> Inode:
    """Go up to the parent directory, at the top to itself; `path_nodes` are those above it."""
    if len(path_nodes) > 1:
        path_nodes.popitem()
    return next(reversed(path_nodes.values()))


def _zeroes(length: int) -> Iterator[bytes]:
    while length > 0:
        step = min(length, CHUNK)
        yield _ZEROES[:step] if step < CHUNK else _ZEROES
        length -= step


def _split(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name]


def _names(path: str) -> list[bytes]:
    return _split(path.encode("utf-8", "surrogateescape"))


def _leaves_mount(names: list[bytes]) -> UnsupportedError:
    return UnsupportedError(f"a link leads to another filesystem, /{_text(b'/'.join(names))}")


def _text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")

"""`TracedFilesystem`: a filesystem that records which blocks each of its answers depends on.

Inodes and directory lookups are cached with the blocks they were read from and the files whose
paths use them. When blocks change, `refresh` reads the inodes and names in them again and returns
the files whose paths may now lead elsewhere: none, if an inode is equal to before, or if only other
names of a directory changed. Not covered: changes of superblock and descriptors; those need a new
object.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.inode import Inode
from nbdproxy.oracles.mounts import ONLY, Mount
from nbdproxy.oracles.watched import ReadRange, WatchedDevice


class AnswerKind(IntEnum):
    """The kinds of answers that depend on blocks."""

    INODE = 0
    DIRECTORY = 1
    PATH = 2
    CONTENT = 3


AnswerKey = tuple[AnswerKind, int]
"""A kind, and the number of an inode (INODE, DIRECTORY) or of a file (PATH, CONTENT)."""


@dataclass(frozen=True, slots=True)
class CachedError:
    """An answer that is an error; as text, since an exception grows with each time it is raised."""

    kind: type[CorruptError] | type[UnsupportedError]
    message: str

    def error(self) -> CorruptError | UnsupportedError:
        """Return the error to raise."""
        return self.kind(self.message)


class AnswerIndex:
    """Which answers depend on which blocks; `by_block` has the keys of a block's answers."""

    def __init__(self) -> None:
        self.by_block: dict[int, set[AnswerKey]] = {}
        self._blocks: dict[AnswerKey, set[int]] = {}

    def put(self, key: AnswerKey, blocks: set[int]) -> None:
        """Replace the blocks that an answer depends on."""
        before = self._blocks.get(key, set())
        for block in before - blocks:
            keys = self.by_block[block]
            keys.discard(key)
            if not keys:
                del self.by_block[block]
        for block in blocks - before:
            self.by_block.setdefault(block, set()).add(key)
        if blocks:
            self._blocks[key] = blocks
        else:
            self._blocks.pop(key, None)

    def add(self, key: AnswerKey, blocks: Iterable[int]) -> None:
        """Add blocks that an answer depends on."""
        known = self._blocks.setdefault(key, set())
        for block in blocks:
            if block not in known:
                known.add(block)
                self.by_block.setdefault(block, set()).add(key)

    def drop(self, key: AnswerKey) -> None:
        """Forget an answer."""
        self.put(key, set())


@dataclass(slots=True)
class PathDependencies:
    """What one path depends on: inodes, and names looked up in directories, by their inodes."""

    inodes: set[int] = field(default_factory=set)
    names: set[tuple[int, bytes]] = field(default_factory=set)


@dataclass(slots=True)
class NameLookups:
    """The names that were looked up in one directory, with the blocks each depends on.

    found   by name, an inode's number, None or an error
    blocks  by name, the blocks that its lookup read
    names   by block, the names whose lookups read it
    shared  how many blocks all names depend on, of those that are in the index
    """

    found: dict[bytes, int | CachedError | None] = field(default_factory=dict)
    blocks: dict[bytes, set[int]] = field(default_factory=dict)
    names: defaultdict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    shared: int = 0

    def put(self, name: bytes, found: int | CachedError | None, blocks: set[int]) -> None:
        """Cache a lookup."""
        self.drop(name)
        self.found[name], self.blocks[name] = found, blocks
        for block in blocks:
            self.names[block].add(name)

    def drop(self, name: bytes) -> None:
        """Forget an answer."""
        self.found.pop(name, None)
        for block in self.blocks.pop(name, ()):
            names = self.names[block]
            names.discard(name)
            if not names:
                del self.names[block]


class TracedFilesystem(Filesystem):
    """A filesystem on a device whose blocks may change between calls of `refresh`."""

    def __init__(self, device: WatchedDevice, mount: Mount = ONLY) -> None:
        super().__init__(device, mount)
        self.index = AnswerIndex()
        self._watched = device
        self._dependencies = PathDependencies()
        self._dependencies_of: dict[int, PathDependencies] = {}
        self._nodes: dict[int, Inode | CachedError] = {}
        self._lookups: dict[int, NameLookups] = {}
        self._files_by_inode: defaultdict[int, set[int]] = defaultdict(set)
        self._files_by_name: defaultdict[int, defaultdict[bytes, set[int]]] = defaultdict(
            lambda: defaultdict(set)
        )

    def block(self, number: int) -> bytes:
        """Return one block of metadata, noted as read even if it was kept."""
        size = self.superblock.block_size
        self._watched.note(number * size, size)
        return super().block(number)

    def inode(self, number: int) -> Inode:
        """Return one inode; raises CorruptError if the kernel could not read it."""
        self._dependencies.inodes.add(number)
        found = self._nodes.get(number)
        if found is None:
            found = self._read_node(number)
        if isinstance(found, CachedError):
            raise found.error()
        return found

    def child(self, node: Inode, name: bytes) -> int | None:
        """Return the number under a name; raises as `Filesystem.child` does."""
        self._dependencies.names.add((node.number, name))
        lookups = self._lookups.setdefault(node.number, NameLookups())
        if name not in lookups.found:
            self._look_up(node, name, lookups)
        found = lookups.found[name]
        if isinstance(found, CachedError):
            raise found.error()
        return found

    def resolve(
        self, file: int, path: bytes, *, follow_last: bool = True
    ) -> Inode | CachedError | None:
        """Return what a file's path leads to; replaces the dependencies of its last call."""
        self._dependencies = PathDependencies()
        outer_ranges = self._watched.take()
        found: Inode | CachedError | None
        try:
            found = self.lookup(path, follow_last=follow_last)
        except (CorruptError, UnsupportedError) as error:
            found = CachedError(type(error), str(error))
        self.index.put((AnswerKind.PATH, file), self.blocks_of(self._watched.take()))
        self._watched.ranges = outer_ranges
        self._replace_dependencies(file, self._dependencies)
        return found

    def forget(self, file: int) -> None:
        """Forget the dependencies of a file's path."""
        self.index.drop((AnswerKind.PATH, file))
        self._replace_dependencies(file, PathDependencies())
        del self._dependencies_of[file]

    def refresh(self, changed: Iterable[int]) -> tuple[set[int], set[int]]:
        """Re-read what changed; return the files to resolve again, and those to judge again."""
        self._blocks.clear()
        kinds: dict[AnswerKind, set[int]] = {kind: set() for kind in AnswerKind}
        changed_blocks: defaultdict[int, set[int]] = defaultdict(set)
        for block in changed:
            for kind, number in self.index.by_block.get(block, ()):
                kinds[kind].add(number)
                if kind is AnswerKind.DIRECTORY:
                    changed_blocks[number].add(block)
        stale = kinds[AnswerKind.PATH]
        for number in kinds[AnswerKind.INODE]:
            before = self._nodes[number]
            now = self._read_node(number)
            if now == before:
                continue
            if _is_directory(before) and _is_directory(now):
                if number in self._lookups:
                    kinds[AnswerKind.DIRECTORY].add(number)
                    self._directories.pop(number, None)
                continue
            stale |= self._files_by_inode[number]
            self._forget_names(number)
        for number in kinds[AnswerKind.DIRECTORY]:
            stale |= self._renew_names(number, changed_blocks[number])
        return stale, kinds[AnswerKind.CONTENT]

    def blocks_of(self, ranges: Iterable[ReadRange]) -> set[int]:
        """Return the blocks that ranges of bytes touch."""
        size = self.superblock.block_size
        found: set[int] = set()
        for start, end in ranges:
            found.update(range(start // size, -(-end // size)))
        return found

    def _read_node(self, number: int) -> Inode | CachedError:
        outer_ranges = self._watched.take()
        found: Inode | CachedError
        try:
            found = self._read_inode(number)
        except CorruptError as error:
            found = CachedError(type(error), str(error))
        self.index.put((AnswerKind.INODE, number), self.blocks_of(self._watched.take()))
        self._watched.ranges = outer_ranges
        self._nodes[number] = found
        return found

    def _look_up(self, node: Inode, name: bytes, lookups: NameLookups) -> None:
        """Look a name up, and record the blocks that the answer depends on."""
        outer_ranges = self._watched.take()
        found: int | CachedError | None
        try:
            found = super().child(node, name)
        except (CorruptError, UnsupportedError) as error:
            found = CachedError(type(error), str(error))
        blocks = self.blocks_of(self._watched.take())
        self._watched.ranges = outer_ranges
        lookups.put(name, found, blocks)
        key = (AnswerKind.DIRECTORY, node.number)
        self.index.add(key, blocks)
        directory = self._directories.get(node.number)
        if directory is not None and len(directory.shared) != lookups.shared:
            self.index.add(key, directory.shared)
            lookups.shared = len(directory.shared)

    def _renew_names(self, number: int, changed_blocks: set[int]) -> set[int]:
        """Look up again the names that depend on these blocks; return the files that are affected.

        All names are looked up again if one of the blocks is shared by them.
        """
        lookups, node = self._lookups.get(number), self._nodes[number]
        if lookups is None:
            return set()  # it is no directory any more
        assert isinstance(node, Inode)
        directory = self._directories.get(number)
        if directory is None or not directory.shared.isdisjoint(changed_blocks):
            self._directories.pop(number, None)
            names = set(lookups.found)
            lookups.shared = 0
            self.index.put((AnswerKind.DIRECTORY, number), set())
        else:
            names = {name for block in changed_blocks for name in lookups.names.get(block, ())}
        stale: set[int] = set()
        for name in names:
            before = lookups.found[name]
            self._look_up(node, name, lookups)
            if lookups.found[name] != before:
                stale |= self._files_by_name[number][name]
        return stale

    def _forget_names(self, number: int) -> None:
        self._directories.pop(number, None)
        if self._lookups.pop(number, None) is not None:
            self.index.drop((AnswerKind.DIRECTORY, number))

    def _replace_dependencies(self, file: int, dependencies: PathDependencies) -> None:
        before = self._dependencies_of.get(file, PathDependencies())
        self._dependencies_of[file] = dependencies
        for number in dependencies.inodes - before.inodes:
            self._files_by_inode[number].add(file)
        for number, name in dependencies.names - before.names:
            self._files_by_name[number][name].add(file)
        for number, name in before.names - dependencies.names:
            files = self._files_by_name[number][name]
            files.discard(file)
            if not files:
                del self._files_by_name[number][name]
                if number in self._lookups:
                    self._lookups[number].drop(name)
                if not self._files_by_name[number]:
                    del self._files_by_name[number]
                    self._forget_names(number)
        for number in before.inodes - dependencies.inodes:
            self._files_by_inode[number].discard(file)
            if not self._files_by_inode[number]:
                del self._files_by_inode[number]
                del self._nodes[number]
                self.index.drop((AnswerKind.INODE, number))


def _is_directory(found: Inode | CachedError) -> bool:
    return isinstance(found, Inode) and found.is_directory

"""`TracedFilesystem`: a filesystem that knows what each answer was made from.

Inodes and directories are read once and kept, with the blocks they stand in and the files that
were found through them. When blocks change, `refresh` reads again what stood in them and tells
which files may now be found elsewhere: an inode that came out equal, or a directory in which other
names changed, concerns nobody. Not covered: changes of superblock and descriptors; those need a
new one.
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
    """What can depend on a block."""

    INODE = 0
    DIRECTORY = 1
    PATH = 2
    CONTENT = 3


AnswerKey = tuple[AnswerKind, int]
"""A kind and the number of an inode, or of a file of the manifest."""


@dataclass(frozen=True, slots=True)
class KeptError:
    """An answer that is an error: kept as its words, as an exception grows when raised again."""

    kind: type[CorruptError] | type[UnsupportedError]
    words: str

    def error(self) -> CorruptError | UnsupportedError:
        """Return the error to raise."""
        return self.kind(self.words)


class AnswerIndex:
    """Which answers were made from which blocks; `at` leads from a block to them."""

    def __init__(self) -> None:
        self.at: dict[int, set[AnswerKey]] = {}
        self._blocks: dict[AnswerKey, set[int]] = {}

    def put(self, key: AnswerKey, blocks: set[int]) -> None:
        """Say that an answer was made from these blocks, and no longer from others."""
        before = self._blocks.get(key, set())
        for block in before - blocks:
            keys = self.at[block]
            keys.discard(key)
            if not keys:
                del self.at[block]
        for block in blocks - before:
            self.at.setdefault(block, set()).add(key)
        if blocks:
            self._blocks[key] = blocks
        else:
            self._blocks.pop(key, None)

    def add(self, key: AnswerKey, blocks: Iterable[int]) -> None:
        """Say that an answer was made from these blocks as well."""
        known = self._blocks.setdefault(key, set())
        for block in blocks:
            if block not in known:
                known.add(block)
                self.at.setdefault(block, set()).add(key)

    def drop(self, key: AnswerKey) -> None:
        """Forget an answer."""
        self.put(key, set())


@dataclass(slots=True)
class Way:
    """What one path was followed through: inodes, and names looked for in directories."""

    inodes: set[int] = field(default_factory=set)
    names: set[tuple[int, bytes]] = field(default_factory=set)


@dataclass(slots=True)
class Answers:
    """What names of one directory were found to be, and the blocks that each was read from.

    `shared` is how many blocks all of them depend on, as far as is noted.
    """

    found: dict[bytes, int | KeptError | None] = field(default_factory=dict)
    blocks: dict[bytes, set[int]] = field(default_factory=dict)
    names: defaultdict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    shared: int = 0

    def put(self, name: bytes, found: int | KeptError | None, blocks: set[int]) -> None:
        """Keep an answer."""
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
        self._way = Way()
        self._ways: dict[int, Way] = {}
        self._nodes: dict[int, Inode | KeptError] = {}
        self._answers: dict[int, Answers] = {}
        self._through: defaultdict[int, set[int]] = defaultdict(set)
        self._asked: defaultdict[int, defaultdict[bytes, set[int]]] = defaultdict(
            lambda: defaultdict(set)
        )

    def block(self, number: int) -> bytes:
        """Return one block of metadata, noted as read even if it was kept."""
        size = self.superblock.block_size
        self._watched.note(number * size, size)
        return super().block(number)

    def inode(self, number: int) -> Inode:
        """Return one inode; raises CorruptError if the kernel could not read it."""
        self._way.inodes.add(number)
        found = self._nodes.get(number)
        if found is None:
            found = self._read_node(number)
        if isinstance(found, KeptError):
            raise found.error()
        return found

    def child(self, node: Inode, name: bytes) -> int | None:
        """Return the number under a name; raises as `Filesystem.child` does."""
        self._way.names.add((node.number, name))
        answers = self._answers.setdefault(node.number, Answers())
        if name not in answers.found:
            self._ask(node, name, answers)
        found = answers.found[name]
        if isinstance(found, KeptError):
            raise found.error()
        return found

    def follow(
        self, file: int, path: bytes, *, follow_last: bool = True
    ) -> Inode | KeptError | None:
        """Return what a path leads to, on behalf of a file; replaces the way of its last call."""
        self._way = Way()
        outer = self._watched.take()
        found: Inode | KeptError | None
        try:
            found = self.lookup(path, follow_last=follow_last)
        except (CorruptError, UnsupportedError) as error:
            found = KeptError(type(error), str(error))
        self.index.put((AnswerKind.PATH, file), self.blocks_of(self._watched.take()))
        self._watched.ranges = outer
        self._replace_way(file, self._way)
        return found

    def forget(self, file: int) -> None:
        """Forget the way on behalf of a file."""
        self.index.drop((AnswerKind.PATH, file))
        self._replace_way(file, Way())
        del self._ways[file]

    def refresh(self, changed: Iterable[int]) -> tuple[set[int], set[int]]:
        """Take note of changed blocks; return the files to follow and those to judge again."""
        self._blocks.clear()
        kinds: dict[AnswerKind, set[int]] = {kind: set() for kind in AnswerKind}
        touched: defaultdict[int, set[int]] = defaultdict(set)
        for block in changed:
            for kind, number in self.index.at.get(block, ()):
                kinds[kind].add(number)
                if kind is AnswerKind.DIRECTORY:
                    touched[number].add(block)
        stale = kinds[AnswerKind.PATH]
        for number in kinds[AnswerKind.INODE]:
            before = self._nodes[number]
            now = self._read_node(number)
            if now == before:
                continue
            if _is_directory(before) and _is_directory(now):
                if number in self._answers:
                    kinds[AnswerKind.DIRECTORY].add(number)
                    self._folders.pop(number, None)
                continue
            stale |= self._through[number]
            self._forget_names(number)
        for number in kinds[AnswerKind.DIRECTORY]:
            stale |= self._renew_names(number, touched[number])
        return stale, kinds[AnswerKind.CONTENT]

    def blocks_of(self, ranges: Iterable[ReadRange]) -> set[int]:
        """Return the blocks that ranges of bytes touch."""
        size = self.superblock.block_size
        found: set[int] = set()
        for start, end in ranges:
            found.update(range(start // size, -(-end // size)))
        return found

    def _read_node(self, number: int) -> Inode | KeptError:
        outer = self._watched.take()
        found: Inode | KeptError
        try:
            found = self._read_inode(number)
        except CorruptError as error:
            found = KeptError(type(error), str(error))
        self.index.put((AnswerKind.INODE, number), self.blocks_of(self._watched.take()))
        self._watched.ranges = outer
        self._nodes[number] = found
        return found

    def _ask(self, node: Inode, name: bytes, answers: Answers) -> None:
        """Look a name up, and note what the answer was read from."""
        outer = self._watched.take()
        found: int | KeptError | None
        try:
            found = super().child(node, name)
        except (CorruptError, UnsupportedError) as error:
            found = KeptError(type(error), str(error))
        blocks = self.blocks_of(self._watched.take())
        self._watched.ranges = outer
        answers.put(name, found, blocks)
        key = (AnswerKind.DIRECTORY, node.number)
        self.index.add(key, blocks)
        folder = self._folders.get(node.number)
        if folder is not None and len(folder.shared) != answers.shared:
            self.index.add(key, folder.shared)
            answers.shared = len(folder.shared)

    def _renew_names(self, number: int, touched: set[int]) -> set[int]:
        """Look up again what was read from these blocks; return the files that it leads elsewhere.

        Everything is looked up again if all of the directory depends on one of them.
        """
        answers, node = self._answers.get(number), self._nodes[number]
        if answers is None:
            return set()  # it is no directory any more
        assert isinstance(node, Inode)
        folder = self._folders.get(number)
        if folder is None or not folder.shared.isdisjoint(touched):
            self._folders.pop(number, None)
            names = set(answers.found)
            answers.shared = 0
            self.index.put((AnswerKind.DIRECTORY, number), set())
        else:
            names = {name for block in touched for name in answers.names.get(block, ())}
        stale: set[int] = set()
        for name in names:
            before = answers.found[name]
            self._ask(node, name, answers)
            if answers.found[name] != before:
                stale |= self._asked[number][name]
        return stale

    def _forget_names(self, number: int) -> None:
        self._folders.pop(number, None)
        if self._answers.pop(number, None) is not None:
            self.index.drop((AnswerKind.DIRECTORY, number))

    def _replace_way(self, file: int, way: Way) -> None:
        before = self._ways.get(file, Way())
        self._ways[file] = way
        for number in way.inodes - before.inodes:
            self._through[number].add(file)
        for number, name in way.names - before.names:
            self._asked[number][name].add(file)
        for number, name in before.names - way.names:
            files = self._asked[number][name]
            files.discard(file)
            if not files:
                del self._asked[number][name]
                if number in self._answers:
                    self._answers[number].drop(name)
                if not self._asked[number]:
                    del self._asked[number]
                    self._forget_names(number)
        for number in before.inodes - way.inodes:
            self._through[number].discard(file)
            if not self._through[number]:
                del self._through[number]
                del self._nodes[number]
                self.index.drop((AnswerKind.INODE, number))


def _is_directory(found: Inode | KeptError) -> bool:
    return isinstance(found, Inode) and found.is_directory

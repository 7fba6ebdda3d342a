"""To what the bytes of a disk belong that a file was read from, in words.

Those are the file's data, and the structures that lead to it: inode, extents, directories, journal.
The ext family is read as a whole. Of its journal those transactions are told that carry something
of the file, and those before them that are lost as well, as a later one does not count without the
earlier. Of other filesystems only the file's data is known, by its content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from nbdproxy.crash.states.naming import StateId
from nbdproxy.crash.states.timeline import CrashDisk, Timeline
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles import check
from nbdproxy.oracles.content_map import ContentMap
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.journal import LogBlock
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.filesystems import NAMES, FilesystemKind, kind_of
from nbdproxy.oracles.manifest import Entry
from nbdproxy.oracles.mounts import PartitionName, Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.owners import Owner, OwnerMap
from nbdproxy.oracles.partitions import Slice
from nbdproxy.oracles.quick import QUICK


class BlockOwners:
    """Says of one disk, for any file of it, to what its bytes belong; reads the disk once."""

    def __init__(self, disk: CrashDisk, tree: Tree, oracle: Oracle) -> None:
        self._disk = disk
        self._tree = tree
        self._oracle = oracle
        self._logs: dict[PartitionName, _JournalCopies] = {}

    @cached_property
    def _owners(self) -> OwnerMap:
        return OwnerMap(self._disk, self._tree)

    def names_of(self, entry: Entry) -> ExtNames | OtherNames:
        """Return what says to whom the bytes belong that a file was read from.

        Raises FilesystemError if it is not known where the file is.
        """
        mount = self._tree.of(entry.path)
        if isinstance(mount, str):
            raise FilesystemError(f"{entry.path}: {mount}")
        part = check.only(check.candidates(self._disk, mount.partition))
        kind = kind_of(part.device)
        if kind is not FilesystemKind.EXT:
            content = self._oracle.content(self._disk, entry, mount=mount) or b""
            return OtherNames(self._disk, kind, entry, self._tree, content)
        if part.key not in self._logs:
            self._logs[part.key] = _JournalCopies(part, self._owners)
        return ExtNames(self._owners, self._logs[part.key], entry)


class RecordingOwners:
    """To what the bytes of a recording's states belong; each state is read once."""

    def __init__(self, timeline: Timeline, tree: Tree, oracle: Oracle = QUICK) -> None:
        self.timeline = timeline
        self.tree = tree
        self.oracle = oracle
        self._states: dict[StateId, BlockOwners] = {}

    def of(self, state: StateId) -> BlockOwners:
        """Return those of one state."""
        if state not in self._states:
            disk = self.timeline.open(state)
            self._states[state] = BlockOwners(disk, self.tree, self.oracle)
        return self._states[state]


class OtherNames:
    """Names of a filesystem that only a kernel reads: the file's data, and all else."""

    is_exact = False

    def __init__(
        self,
        disk: CrashDisk,
        kind: FilesystemKind | None,
        entry: Entry,
        tree: Tree,
        content: bytes,
    ) -> None:
        self._map = ContentMap(disk, entry.path, content, tree)
        self._all_else = f"{NAMES[kind]} metadata, or data packed into it" if kind else "metadata"

    def of(self, extent: Extent) -> list[Owner]:
        """Return the owners of an extent, in order."""
        return self._map.of(extent)

    def words(self, owner: Owner) -> str | None:
        """Return what a piece of the disk is."""
        return self._all_else if owner.kind is OwnerKind.UNKNOWN else _words(owner)


class ExtNames:
    """Names of the ext family: its own structures, and of the journal what a file needs of it."""

    is_exact = True

    def __init__(self, owners: OwnerMap, log: _JournalCopies, entry: Entry) -> None:
        self._owners = owners
        self._block = log.block_size
        self._logged = log.words_for(entry)

    def of(self, extent: Extent) -> list[Owner]:
        """Return the owners of an extent, in order."""
        return self._owners.of(extent)

    def words(self, owner: Owner) -> str | None:
        """Return what a piece of the disk is; None for what the file needs not of the journal."""
        if owner.kind is not OwnerKind.JOURNAL:
            return _words(owner)
        at = owner.extent.offset
        while at < owner.extent.end:
            found = self._logged.get(at - at % self._block)
            if found is not None:
                return found
            at += self._block
        return None


class _JournalCopies:
    """The journal of one filesystem: which of its blocks carry what; empty if it cannot be read."""

    def __init__(self, part: Slice, owners: OwnerMap) -> None:
        self._part = part
        self._blocks: dict[int, LogBlock] = {}
        self._head: list[Extent] = []
        self._carried: dict[int, list[Owner]] = {}
        self.block_size = 1
        try:
            filesystem = Filesystem(part.device)
            found = journal.log_map(filesystem)
        except FilesystemError:
            return
        self._blocks = found
        self.block_size = size = filesystem.superblock.block_size
        if found:
            first = filesystem.runs(filesystem.inode(filesystem.superblock.journal_inode))[0]
            self._head = list(part.on_disk(first.physical * size, size))
        for block in found.values():
            if block.target is not None:
                carried = self._carried.setdefault(block.transaction, [])
                for extent in part.on_disk(block.target * size, size):
                    carried += owners.of(extent)

    def words_for(self, entry: Entry) -> dict[int, str]:
        """Return what the blocks are that a file needs of it, by their first bytes on the disk."""
        carried = {
            transaction: list(dict.fromkeys(_carried(owners, entry)))
            for transaction, owners in self._carried.items()
        }
        needed = [transaction for transaction, words in carried.items() if words]
        logged = {extent.offset: "journal superblock" for extent in self._head}
        for number, block in self._blocks.items():
            if not needed or block.transaction > max(needed):
                continue
            what = ", ".join(carried.get(block.transaction, ()))
            for extent in self._part.on_disk(number * self.block_size, self.block_size):
                logged[extent.offset] = f"journal, transaction {block.transaction}" + (
                    f": {what}" if what else ""
                )
        return logged


def _words(owner: Owner) -> str:
    return replace(owner, paths=owner.paths[:1], offset=None).words()


def _carried(owners: Sequence[Owner], entry: Entry) -> Iterator[str]:
    """Yield what of a file, and of the directories on the way to it, some owners are."""
    for owner in owners:
        if entry.path in owner.paths:
            yield f"{owner.kind} of {entry.path}"
        elif owner.kind is OwnerKind.DIRECTORY and any(
            entry.path.startswith(path.rstrip("/") + "/") for path in owner.paths
        ):
            yield f"directory {owner.path}"

"""Whose bytes a file hangs on: its own data, and the structures that lead to it, in words.

The ext family is read as a whole. Of its journal those transactions are told that carry something
of the file, and those before them that are lost as well, as a later one does not count without the
earlier. Of other filesystems only the file's data is known, by its content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nbdproxy.crash.states.timeline import CrashDisk
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles import check
from nbdproxy.oracles.content_map import ContentMap
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.filesystems import NAMES, FilesystemKind, kind_of
from nbdproxy.oracles.manifest import Entry
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.owners import Owner, OwnerMap
from nbdproxy.oracles.partitions import Slice


def names_of(disk: CrashDisk, entry: Entry, tree: Tree, oracle: Oracle) -> ExtNames | OtherNames:
    """Return what says whose the bytes of a disk are that a file hangs on.

    Raises FilesystemError if it is not known where the file is.
    """
    mount = tree.of(entry.path)
    if isinstance(mount, str):
        raise FilesystemError(f"{entry.path}: {mount}")
    part = check.only(check.candidates(disk, mount.partition))
    kind = kind_of(part.device)
    if kind is FilesystemKind.EXT:
        return ExtNames(disk, part, entry, tree)
    content = oracle.content(disk, entry, mount=mount) or b""
    return OtherNames(disk, kind, entry, tree, content)


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

    def __init__(self, disk: CrashDisk, part: Slice, entry: Entry, tree: Tree) -> None:
        self._owners = OwnerMap(disk, tree)
        self._logged: dict[int, str] = {}
        self._block = 1
        try:
            filesystem = Filesystem(part.device)
            found = journal.log_map(filesystem)
        except FilesystemError:
            return
        self._block = size = filesystem.superblock.block_size
        if found:
            first = filesystem.runs(filesystem.inode(filesystem.superblock.journal_inode))[0]
            for extent in part.on_disk(first.physical * size, size):
                self._logged[extent.offset] = "journal superblock"
        carried: dict[int, list[str]] = {}
        for block in found.values():
            if block.target is not None:
                words = _carried(part, self._owners, block.target * size, size, entry)
                carried.setdefault(block.transaction, []).extend(words)
        needed = [number for number, words in carried.items() if words]
        for number, block in found.items():
            if not needed or block.transaction > max(needed):
                continue
            what = ", ".join(dict.fromkeys(carried.get(block.transaction, ())))
            for extent in part.on_disk(number * size, size):
                self._logged[extent.offset] = f"journal, transaction {block.transaction}" + (
                    f": {what}" if what else ""
                )

    def of(self, extent: Extent) -> list[Owner]:
        """Return the owners of an extent, in order."""
        return self._owners.of(extent)

    def words(self, owner: Owner) -> str | None:
        """Return what a piece of the disk is; None for what of the journal the file needs not."""
        if owner.kind is not OwnerKind.JOURNAL:
            return _words(owner)
        at = owner.extent.offset
        while at < owner.extent.end:
            found = self._logged.get(at - at % self._block)
            if found is not None:
                return found
            at += self._block
        return None


def _words(owner: Owner) -> str:
    return replace(owner, paths=owner.paths[:1], offset=None).words()


def _carried(part: Slice, owners: OwnerMap, at: int, size: int, entry: Entry) -> Iterator[str]:
    """Yield what of a file a block of its filesystem holds."""
    for extent in part.on_disk(at, size):
        for owner in owners.of(extent):
            if entry.path in owner.paths:
                yield f"{owner.kind} of {entry.path}"
            elif owner.kind is OwnerKind.DIRECTORY and any(
                entry.path.startswith(path.rstrip("/") + "/") for path in owner.paths
            ):
                yield f"directory {owner.path}"

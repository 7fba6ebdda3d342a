"""Why a file is not whole in a crash state, byte range by byte range.

The state is compared with one of the same cut that keeps more and has the file whole: whatever the
file hangs on there, and the state lacks, was lost. What it hangs on is what the oracle read to find
it whole: its data, its inode, extents and directories, the journal's transactions, and the tables
of a qcow2 file. Only the ext family is followed so closely.

Of the journal those transactions are told that carry something of the file, and those before them
that are lost as well, as a later one does not count without the earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbdproxy.crash.blame import Blame, blame
from nbdproxy.crash.naming import Choice, StateId
from nbdproxy.crash.paint import NOTHING
from nbdproxy.crash.timeline import CrashDisk, Timeline
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles import check
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.filesystems import open_filesystem
from nbdproxy.oracles.incremental import IncrementalCheck
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.owners import Owner, OwnerMap
from nbdproxy.oracles.partitions import Slice
from nbdproxy.persistence.model import Level


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a request that the state lacks; `what` says what it was, `extent` where.

    Instants are nanoseconds since the recording began.
    """

    extent: Extent
    what: str
    seq: int
    received_ns: int
    blame: Blame


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, end) of the file: lost with their data, or `None` if that is there.

    `is_whole` tells whether the state shows them as they should be; if not, and their data is
    there, it is the way to it that was lost.
    """

    start: int
    end: int
    data: Piece | None
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Losses:
    """What a state lacks of a file; `reference` is the state that has it whole.

    `ranges` cover the file; those without data of their own, such as holes, count as there. `way`
    is what is lost of all that leads to the data; empty where the file is found all the same, at
    its full length, with all of its data that was not lost.
    """

    reference: StateId
    ranges: tuple[Range, ...]
    way: tuple[Piece, ...]


def losses(
    timeline: Timeline, entry: Entry, state: StateId, partition: int | None
) -> Losses | None:
    """Return what a state lacks of a file; None if no state of its cut has it whole."""
    reference = _reference(timeline, entry, state, partition)
    if reference is None:
        return None
    here, there = timeline.open(state), timeline.open(reference)
    follower = IncrementalCheck(Manifest((entry,)), partition=partition)
    follower.check(there, None)
    owners = OwnerMap(there, partition=partition)
    logged = _Log(there, entry, owners, partition)
    data: list[tuple[int, Piece]] = []
    way: dict[tuple[int, str], Piece] = {}
    size = timeline.source.size
    for extent in follower.reads:
        for start, end, row in _lacking(here, there, extent.offset, min(extent.end, size)):
            for owner in owners.of(Extent(start, end - start)):
                what = logged.words(owner) if owner.kind is OwnerKind.JOURNAL else _words(owner)
                if what is None:
                    continue
                piece = _piece(timeline, row, owner.extent, what, state)
                if owner.kind is OwnerKind.FILE_DATA and entry.path in owner.paths:
                    data.append((owner.offset or 0, piece))
                else:
                    way.setdefault((row, what), piece)
    shown, should = (_content(disk, entry, partition) for disk in (here, there))
    assert should is not None
    ranges = tuple(
        one
        if one.data or shown is None
        else replace(one, is_whole=shown[one.start : one.end] == should[one.start : one.end])
        for one in _ranges(len(should), data)
    )
    is_found = shown is not None and len(shown) == len(should)
    needs_way = not is_found or not all(one.data or one.is_whole for one in ranges)
    return Losses(reference, ranges, tuple(way.values()) if needs_way else ())


def _reference(
    timeline: Timeline, entry: Entry, state: StateId, partition: int | None
) -> StateId | None:
    """Return the state of the least level that has the file whole."""
    levels = list(Level)
    for level in levels[levels.index(state.level) + 1 :]:
        fuller = StateId(state.position, level, Choice.MUST, state.options)
        found = check.check(timeline.open(fuller), Manifest((entry,)), partition=partition)
        if found.verdict is Verdict.PASS:
            return fuller
    return None


def _lacking(
    here: CrashDisk, there: CrashDisk, start: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """Yield where the fuller state shows a request that the other does not have, and which."""
    shown = list(here.segments(start, end))
    for low, high, row in there.segments(start, end):
        if row == NOTHING:
            continue
        for other_low, other_high, other in shown:
            first, last = max(low, other_low), min(high, other_high)
            if first >= last or other == row:
                continue
            if here.pread(first, last - first) != there.pread(first, last - first):
                yield first, last, row


def _piece(timeline: Timeline, row: int, extent: Extent, what: str, state: StateId) -> Piece:
    seq = int(timeline.table.seq[row])
    why = blame(timeline, row, state.position, state.options)
    return Piece(extent, what, seq, timeline.source.time_of(seq), why)


def _words(owner: Owner) -> str:
    return replace(owner, paths=owner.paths[:1], offset=None).words()


def _ranges(length: int, data: list[tuple[int, Piece]]) -> Iterator[Range]:
    """Yield the whole file: what was lost, and what lies between."""
    at = 0
    covered = ExtentSet()
    for offset, piece in sorted(data, key=lambda one: one[0]):
        start, end = max(at, offset), min(length, offset + piece.extent.length)
        if start >= end:
            continue
        if at < start:
            yield Range(at, start, None)
        yield Range(start, end, piece)
        covered.add(start, end)
        at = end
    if at < length:
        yield Range(at, length, None)


def _content(disk: CrashDisk, entry: Entry, partition: int | None) -> bytes | None:
    """Return what a state shows of a file; None if it cannot be read."""
    try:
        filesystem = open_filesystem(check.only(check.candidates(disk, partition)).device)
        node = filesystem.lookup(check.absolute(entry.path), follow_last=entry.target is None)
        if node is None:
            return None
        if node.is_symlink:
            return filesystem.symlink_target(node)
        return b"".join(filesystem.chunks(node)) if node.is_regular else None
    except FilesystemError:
        return None


class _Log:
    """Which bytes of the disk are which transaction's, as far as a file needs it."""

    def __init__(
        self, disk: CrashDisk, entry: Entry, owners: OwnerMap, partition: int | None
    ) -> None:
        self._words: dict[int, str] = {}
        self._block = 1
        try:
            part = check.only(check.candidates(disk, partition))
            filesystem = Filesystem(part.device)
            found = journal.log_map(filesystem)
        except FilesystemError:
            return
        self._block = size = filesystem.superblock.block_size
        if found:
            first = filesystem.runs(filesystem.inode(filesystem.superblock.journal_inode))[0]
            for extent in part.on_disk(first.physical * size, size):
                self._words[extent.offset] = "journal superblock"
        carried: dict[int, list[str]] = {}
        for block in found.values():
            if block.target is not None:
                words = _carried(part, owners, block.target * size, size, entry)
                carried.setdefault(block.transaction, []).extend(words)
        needed = [number for number, words in carried.items() if words]
        for number, block in found.items():
            if not needed or block.transaction > max(needed):
                continue
            what = ", ".join(dict.fromkeys(carried.get(block.transaction, ())))
            for extent in part.on_disk(number * size, size):
                self._words[extent.offset] = f"journal, transaction {block.transaction}" + (
                    f": {what}" if what else ""
                )

    def words(self, owner: Owner) -> str | None:
        """Return what a piece of the journal is; None if the file does not need it."""
        at = owner.extent.offset
        while at < owner.extent.end:
            found = self._words.get(at - at % self._block)
            if found is not None:
                return found
            at += self._block
        return None


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

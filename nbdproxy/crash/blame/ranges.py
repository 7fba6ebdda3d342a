"""Why a file is not whole in a crash state, byte range by byte range.

The state is compared with one of the same cut that keeps more and has the file whole. What the
oracle read there to find it whole, and the state does not have, was lost: data, inode, extents,
directories, transactions of the journal, tables of a qcow2 file. Only the ext family is followed so
closely. Of other filesystems data is told by its content, and of all else those requests without
which the file is not whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from nbdproxy.crash.blame.block_owners import RecordingOwners
from nbdproxy.crash.blame.flushes import Blame, blame
from nbdproxy.crash.states.naming import Choice, RequestPart, StateId
from nbdproxy.crash.states.timeline import CrashDisk, Timeline
from nbdproxy.delta_debugging import ddmin
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.composite import TreeCheck, content
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.persistence.model import Level
from nbdproxy.recording.index import BASE


@dataclass(frozen=True, slots=True)
class MissingPiece:
    """A part of a request that the state lacks; `what` says what it was, `extent` where.

    Instants are nanoseconds since the recording began.
    """

    extent: Extent
    what: str
    seq: int
    received_ns: int
    blame: Blame


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes [start, end) of the file: lost with their data, or `None` if that is there.

    `is_whole` tells whether the state shows them as they should be; if not, and their data is
    there, it is the way to it that was lost. It `is_apart` unless it is nowhere on the disk as it
    is: packed into metadata, or compressed.
    """

    start: int
    end: int
    data: MissingPiece | None
    is_whole: bool = False
    is_apart: bool = True


@dataclass(frozen=True, slots=True)
class Losses:
    """What a state lacks of a file; `reference` is the state that has it whole.

    `ranges` cover the file in bytes; those without data of their own, such as holes, count as
    there. `way` are the lost pieces of metadata that lead to the data. It is empty where the state
    shows the file at its full length, with all of its data that was not lost.
    """

    reference: StateId
    ranges: tuple[FileRange, ...]
    way: tuple[MissingPiece, ...]


class LossFinder:
    """Tells what states lack of some files; a state is looked at once for all of them."""

    def __init__(self, owners: RecordingOwners, manifest: Manifest) -> None:
        self._owners = owners
        self._timeline = owners.timeline
        self._all = TreeCheck(owners.oracle, manifest, {}, owners.tree)
        self._whole: dict[StateId, frozenset[str]] = {}
        self._reads: dict[tuple[str, StateId], list[Extent]] = {}

    def losses(self, entry: Entry, state: StateId) -> Losses | None:
        """Return what a state lacks of a file; None if no state of its cut has it whole."""
        timeline, tree, oracle = self._timeline, self._owners.tree, self._owners.oracle
        reference = self._reference(entry, state)
        reads = self._read_of(entry, reference) if reference is not None else []
        if reference is None or not reads:
            return None
        here, there = timeline.open(state), timeline.open(reference)
        shown, should = (content(oracle, d, entry, tree) for d in (here, there))
        if should is None:
            return None
        names = self._owners.of(reference).names_of(entry)
        data: list[tuple[int, MissingPiece]] = []
        way: dict[tuple[int, str], MissingPiece] = {}
        apart = ExtentSet()
        size = timeline.source.size
        for extent in reads:
            stop = min(extent.end, size)
            read = Extent.between(extent.offset, stop)
            for owner in () if names.is_exact else names.of(read):
                if owner.kind is OwnerKind.FILE_DATA:
                    apart.add(owner.offset or 0, (owner.offset or 0) + owner.extent.length)
            for start, end, row in _lacking(here, there, extent.offset, stop):
                for owner in names.of(Extent.between(start, end)):
                    what = names.words(owner)
                    if what is None:
                        continue
                    piece = _piece(timeline, row, owner.extent, what, state)
                    if owner.kind is OwnerKind.FILE_DATA and entry.path in owner.paths:
                        data.append((owner.offset or 0, piece))
                    else:
                        way.setdefault((row, what), piece)
        ranges = tuple(
            one
            if one.data or shown is None
            else replace(one, is_whole=shown[one.start : one.end] == should[one.start : one.end])
            for one in _ranges(len(should), data, None if names.is_exact else apart)
        )
        is_found = shown is not None and len(shown) == len(should)
        needs_way = not is_found or not all(one.data or one.is_whole for one in ranges)
        lost: Sequence[MissingPiece] = list(way.values()) if needs_way else []
        if not names.is_exact:
            lost = _needed(lost, lambda some: self._is_whole(entry, state, data, some))
        return Losses(reference, ranges, tuple(lost))

    def _reference(self, entry: Entry, state: StateId) -> StateId | None:
        """Return the state of the least level that has a file whole."""
        levels = list(Level)
        for level in levels[levels.index(state.level) + 1 :]:
            fuller = StateId(state.position, level, Choice.MUST, state.options)
            if fuller not in self._whole:
                found = self._all.check(self._timeline.open(fuller), None).conditions
                self._whole[fuller] = frozenset(
                    path for path, condition in found.items() if condition is Condition.WHOLE
                )
            if entry.path in self._whole[fuller]:
                return fuller
        return None

    def _read_of(self, entry: Entry, state: StateId) -> list[Extent]:
        """Return what of the disk a file was read from where it is whole; empty if it is not."""
        key = entry.path, state
        if key not in self._reads:
            follower = self._follow(entry)
            found = follower.check(self._timeline.open(state), None)
            is_whole = found.verdict is Verdict.PASS
            self._reads[key] = list(follower.reads or ()) if is_whole else []
        return self._reads[key]

    def _is_whole(
        self,
        entry: Entry,
        state: StateId,
        data: Sequence[tuple[int, MissingPiece]],
        way: Sequence[MissingPiece],
    ) -> bool:
        """Tell whether a state with some requests put back has a file whole."""
        seqs = {piece.seq for _, piece in data} | {piece.seq for piece in way}
        parts = tuple(RequestPart(seq) for seq in sorted(seqs))
        more = StateId(state.position, state.level, Choice.ONLY, state.options, parts)
        found = self._follow(entry).check(self._timeline.open(more), None)
        return found.verdict is Verdict.PASS

    def _follow(self, entry: Entry) -> TreeCheck:
        return TreeCheck(self._owners.oracle, Manifest((entry,)), {}, self._owners.tree)


def _needed(
    pieces: Sequence[MissingPiece], suffice: Callable[[Sequence[MissingPiece]], bool]
) -> Sequence[MissingPiece]:
    """Return those that suffice, and none of which can be left out; all, if all do not suffice."""
    if not suffice(pieces):
        return pieces
    return [] if suffice([]) else ddmin(pieces, suffice)


def _lacking(
    here: CrashDisk, there: CrashDisk, start: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """Yield where the fuller state shows a request that the other does not have, and which."""
    shown = list(here.segments(start, end))
    for low, high, row in there.segments(start, end):
        if row == BASE:
            continue
        for other_low, other_high, other in shown:
            first, last = max(low, other_low), min(high, other_high)
            if first >= last or other == row:
                continue
            if here.pread(first, last - first) != there.pread(first, last - first):
                yield first, last, row


def _piece(timeline: Timeline, row: int, extent: Extent, what: str, state: StateId) -> MissingPiece:
    seq = int(timeline.table.seq[row])
    why = blame(timeline, row, state.position, state.options)
    return MissingPiece(extent, what, seq, timeline.source.time_of(seq), why)


def _ranges(
    length: int, data: list[tuple[int, MissingPiece]], apart: ExtentSet | None
) -> Iterator[FileRange]:
    """Yield the whole file: what was lost, and what lies between; `apart` None is everything."""
    at = 0
    for offset, piece in [*sorted(data, key=lambda one: one[0]), (length, None)]:
        start, end = max(at, offset), length
        if piece is not None:
            end = min(length, offset + piece.extent.length)
        if at < start:
            yield from _between(at, min(start, length), apart)
        if piece is not None and start < end:
            yield FileRange(start, end, piece)
        at = max(at, end)


def _between(start: int, end: int, apart: ExtentSet | None) -> Iterator[FileRange]:
    """Yield ranges that lost no data of their own."""
    for gap in list(apart.missing(start, end)) if apart is not None else ():
        if start < gap.offset:
            yield FileRange(start, gap.offset, None)
        yield FileRange(gap.offset, gap.end, None, is_apart=False)
        start = gap.end
    if start < end:
        yield FileRange(start, end, None)

"""File histories: since when each file was sent, answered and flushed, and what carried it.

A file is looked for in the disks that keep what a level keeps, at one instant after the other: all
at which that changes. `Level.FLUSHED` is what host power loss leaves under cache=none and
writeback, `COMPLETED` what it leaves under writethrough and directsync, `RECEIVED` all that was
sent.

Not covered: stores that lose what was not flushed before the recording ends (`Options.losses`):
what is answered and flushed only grows here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nbdproxy.crash.blame.block_owners import RecordingOwners
from nbdproxy.crash.blame.flushes import Blame, blame
from nbdproxy.crash.blame.replay import JudgedFiles
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.owners import Owner
from nbdproxy.persistence.model import DEFAULTS, Level, Options
from nbdproxy.recording.index import BASE, NEVER

LEVELS = (Level.RECEIVED, Level.COMPLETED, Level.FLUSHED)
"""What is told of each file: when it was sent, answered, and flushed."""


_NOWHERE = {Condition.MISSING, Condition.UNREADABLE, Condition.CANNOT_BE_TOLD}


@dataclass(frozen=True, slots=True)
class ConditionChange:
    """From `position` on, until the next change, a file is in this condition."""

    position: int
    condition: Condition


@dataclass(frozen=True, slots=True)
class LevelHistory:
    """A file's condition in what one level keeps; changes ascend by position, the first is at 0."""

    changes: tuple[ConditionChange, ...]

    @property
    def created(self) -> int | None:
        """The position at which there was something under its name for the first time."""
        there = (c for c in self.changes if c.condition not in _NOWHERE)
        return next((change.position for change in there), None)

    @property
    def first(self) -> int | None:
        """The position at which the file was whole for the first time."""
        return next((c.position for c in self.changes if c.condition is Condition.WHOLE), None)

    @property
    def since(self) -> int | None:
        """The position from which on it is whole until the end; None if it is not, at the end."""
        last = self.changes[-1]
        return last.position if last.condition is Condition.WHOLE else None

    def at(self, position: int) -> Condition:
        """Return the condition at a cut."""
        return [c.condition for c in self.changes if c.position <= position][-1]


@dataclass(frozen=True, slots=True)
class FileHistory:
    """What became of one file, level by level."""

    entry: Entry
    levels: Mapping[Level, LevelHistory]


@dataclass(frozen=True, slots=True)
class CarryingRequest:
    """A request that holds, in the end, some of a file or of what leads to it, and what that is.

    `seq` is its number in the recording, `received_ns` nanoseconds since the recording began,
    `request` its bytes on the disk.
    """

    seq: int
    received_ns: int
    request: Extent
    owners: tuple[Owner, ...]
    blame: Blame


def histories(
    files: JudgedFiles,
    *,
    options: Options = DEFAULTS,
    progress: Callable[[StateId, int, int], None] = lambda _state, _done, _total: None,
) -> tuple[FileHistory, ...]:
    """Return the history of each file.

    `progress` gets the state looked at next, and how many of a level's instants were. Where a
    filesystem cannot be judged, its files cannot be told; raises FilesystemError if that is so at
    the end of all that was sent.
    """
    timeline, manifest = files.timeline, files.manifest
    found: dict[str, dict[Level, list[ConditionChange]]] = {
        entry.path: {level: [] for level in LEVELS} for entry in manifest.entries
    }
    for level in LEVELS:
        follower = TreeCheck(files.oracle, manifest, files.earlier, files.tree)
        last = None
        steps = list(_steps(timeline, level, options))
        for number, (position, changed) in enumerate(steps):
            state = StateId(position, level, Choice.MUST, options)
            progress(state, number, len(steps))
            disk = timeline.open(state)
            findings = follower.check(disk, changed)
            if findings is last and findings.conditions:
                continue
            last = findings
            conditions = findings.conditions
            for path, levels in found.items():
                condition = conditions.get(path, Condition.CANNOT_BE_TOLD)
                changes = levels[level]
                if not changes or changes[-1].condition is not condition:
                    changes.append(ConditionChange(position, condition))
        if level is Level.RECEIVED and last is not None and not last.conditions:
            raise FilesystemError(f"what was sent cannot be read in the end: {last.reason}")
    return tuple(
        FileHistory(
            entry, {level: LevelHistory(tuple(found[entry.path][level])) for level in LEVELS}
        )
        for entry in manifest.entries
    )


def _steps(
    timeline: Timeline, level: Level, options: Options
) -> Iterator[tuple[int, list[Extent] | None]]:
    """Yield the positions at which a level keeps more, and where; first 0, with all of the disk."""
    table = timeline.table
    changing = table.is_changing
    rows = np.flatnonzero(changing & (table.error == 0))
    kept_from = {
        Level.RECEIVED: table.seq,
        Level.COMPLETED: table.completed,
        Level.FLUSHED: timeline.durability(options).durable_from,
    }[level][rows]
    if level is Level.RECEIVED:
        # One that fails is there from when it was received until its error is answered.
        failed = np.flatnonzero(changing & (table.error != 0))
        rows = np.concatenate((rows, failed, failed))
        kept_from = np.concatenate((kept_from, table.seq[failed], table.completed[failed]))
    rows, kept_from = rows[kept_from != NEVER], kept_from[kept_from != NEVER]
    order = np.argsort(kept_from, kind="stable")
    rows, kept_from = rows[order], kept_from[order]
    yield 0, None
    moments, begins = np.unique(kept_from, return_index=True)
    for moment, some in zip(moments.tolist(), np.split(rows, begins[1:]), strict=False):
        yield moment + 1, table.extents(some)


def carrying_requests(
    owners: RecordingOwners, entry: Entry, *, options: Options = DEFAULTS
) -> tuple[CarryingRequest, ...]:
    """Return the requests that a file is made of in the end, in the order received.

    Those are the ones that show in the file's content and in what leads to it: its inode, its
    extents, its directories (only its content, where the filesystem is not of the ext family). What
    all files of the disk need is left out, and the journal; none is returned if the file itself is
    nowhere, or where it is cannot be told.
    """
    timeline, tree = owners.timeline, owners.tree
    if isinstance(tree.of(entry.path), str):
        return ()
    end = timeline.source.events
    disk = timeline.at(end)
    follower = TreeCheck(owners.oracle, Manifest((entry,)), {}, tree)
    follower.check(disk, None)
    names = owners.of(disk.state).names_of(entry)
    found: dict[int, list[Owner]] = {}
    for extent in follower.reads or ():
        stop = min(extent.end, timeline.source.size)
        for start, high, row in disk.segments(extent.offset, stop):
            if row != BASE:
                own = [o for o in names.of(Extent.between(start, high)) if _leads_to(o, entry)]
                found.setdefault(row, []).extend(own)
    if not any(entry.path in owner.paths for some in found.values() for owner in some):
        return ()
    table, source = timeline.table, timeline.source
    return tuple(
        CarryingRequest(
            int(table.seq[row]),
            source.time_of(int(table.seq[row])),
            table.extent(row),
            tuple(dict.fromkeys(some)),
            blame(timeline, row, end, options),
        )
        for row, some in sorted(found.items())
        if some
    )


def _leads_to(owner: Owner, entry: Entry) -> bool:
    """Tell whether this is a file's own, or of a directory on the way to it."""
    return any(
        path == entry.path or entry.path.startswith(path.rstrip("/") + "/") for path in owner.paths
    )

"""Crash states: a printable id, and with the recording the disk that it names.

A state is the base plus a choice of requests. `CrashDisk` paints them in seq order; that order
respects happens-before (a request received after another's completion has the greater seq), and it
is the order that the live server's disk shows after a cut: of two overlapping requests in flight
at once the later received wins. WRITE_ZEROES and TRIM paint zeroes.

Nothing is copied: the disk is an array of segments that says, for each range, which request's
payload shows. Building costs some seconds and at most 40 bytes a request, whatever the disk's size
(measured: `tests/crash/test_memory.py`); the segments that stay are 12 bytes each.

Not covered: torn requests, single sectors, other orders of concurrent requests. Those states are
legal too (rules 6 and 7); an id names only the two ends, what must and all that may be there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from nbdproxy.crash.paint import NOTHING, Painting
from nbdproxy.crash.source import Source
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import UsageError
from nbdproxy.extents import Extent
from nbdproxy.persistence.model import DEFAULTS, Coverage, Level, Options, kept, sent
from nbdproxy.recording.index import Mask, RequestTable
from nbdproxy.requests import Command


class Choice(Enum):
    """Which of the requests that chance decides on are on the disk."""

    MUST = "must"
    """None: only what the level keeps."""
    ALL = "all"
    """All that were received and not answered with an error."""


@dataclass(frozen=True, slots=True)
class StateId:
    """The name of a crash state, such as `s1234.flushed.must`.

    That is the cut's position, the `Level` that is kept, the `Choice` of the rest; then, each
    after a `+` and only where it is not the default, the model's options: `replied`, `fsyncgate`,
    `single` (no CAN_MULTI_CONN), `sector4096`, `lost77` (a loss at position 77).
    """

    position: int
    level: Level
    choice: Choice
    options: Options = DEFAULTS

    def __str__(self) -> str:
        words = [f"s{self.position}.{self.level.value}.{self.choice.value}"]
        if self.options.coverage is not DEFAULTS.coverage:
            words.append(self.options.coverage.value)
        if self.options.fsyncgate:
            words.append("fsyncgate")
        if not self.options.multi_conn:
            words.append("single")
        if self.options.sector != DEFAULTS.sector:
            words.append(f"sector{self.options.sector}")
        words += [f"lost{position}" for position in self.options.losses]
        return "+".join(words)


_STATE_ID = re.compile(
    r"s(?P<position>\d+)\.(?P<level>[a-z]+)\.(?P<choice>[a-z]+)"
    r"(?P<replied>\+replied)?(?P<fsyncgate>\+fsyncgate)?(?P<single>\+single)?"
    r"(?:\+sector(?P<sector>\d+))?(?P<losses>(?:\+lost\d+)*)"
)


def parse_state_id(text: str) -> StateId:
    """Read what `str(StateId)` wrote; raise UsageError for anything else."""
    match = _STATE_ID.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        sector = int(match["sector"] or DEFAULTS.sector)
        if sector < 512 or sector & (sector - 1):
            raise ValueError(text)
        return StateId(
            int(match["position"]),
            Level(match["level"]),
            Choice(match["choice"]),
            Options(
                coverage=Coverage.REPLIED if match["replied"] else Coverage.RECEIVED,
                sector=sector,
                multi_conn=not match["single"],
                fsyncgate=bool(match["fsyncgate"]),
                losses=tuple(int(word) for word in match["losses"].split("+lost")[1:]),
            ),
        )
    except ValueError:
        raise UsageError(
            f"{text!r} is not the id of a crash state: paste one of `nbdproxy replay --json`, "
            f"such as s1234.flushed.must"
        ) from None


def chosen(table: RequestTable, state: StateId) -> Mask:
    """Return the requests that are on the disk in a state."""
    if state.choice is Choice.ALL:
        return sent(table, state.position)
    return kept(table, state.position, state.level, state.options)


def open_state(source: Source, state: StateId) -> CrashDisk:
    """Build a crash state's disk; closing it closes the base that it opened."""
    if state.position > source.events:
        raise UsageError(
            f"state {state} is of another recording: this one has {source.events} events; "
            f"run `nbdproxy replay` on it to see its own states"
        )
    return CrashDisk(source, chosen(source.table, state))


class CrashDisk:
    """The base with some requests painted over it, read-only."""

    def __init__(self, source: Source, choice: Mask) -> None:
        """Paint the rows that `choice` names; opens the base and owns it."""
        rows = np.flatnonzero(choice & (source.table.length > 0)).astype(np.int32)
        self._painting = Painting(source.table.offset, source.table.length, rows)
        del rows
        self._source = source
        self._base: ReadableDevice | None = source.base()

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self._source.size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        assert self._base is not None, "read from a closed disk"
        table = self._source.table
        for start, end, owner in self._painting.segments(offset, offset + len(buffer)):
            part = buffer[start - offset : end - offset]
            if owner == NOTHING:
                self._base.pread_into(start, part)
            elif table.command[owner] == Command.WRITE:
                inside = start - int(table.offset[owner])
                self._source.read_payload(int(table.position[owner]) + inside, part)
            else:
                part[:] = bytes(len(part))

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        pending = Extent(offset, 0)
        for extent in self._data(offset, offset + length):
            if extent.offset == pending.end:
                pending = Extent(pending.offset, pending.length + extent.length)
                continue
            if pending.length:
                yield pending
            pending = extent
        if pending.length:
            yield pending

    def close(self) -> None:
        """Close the base; closing twice is harmless."""
        if self._base is not None:
            self._base.close()
            self._base = None

    def _data(self, first: int, last: int) -> Iterator[Extent]:
        assert self._base is not None, "read from a closed disk"
        for start, end, owner in self._painting.segments(first, last):
            if owner == NOTHING:
                yield from self._base.data_extents(start, end - start)
            elif self._source.table.command[owner] == Command.WRITE:
                yield Extent(start, end - start)

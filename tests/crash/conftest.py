"""Recordings made up in memory, for every test of this room."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.recording.notes import Note, NoteKind
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received, table_of

SECTOR = 512
Event = Received | Completed
Log = list[Event]
MakeSource = Callable[..., MemorySource]


@pytest.fixture
def make_source() -> MakeSource:
    """Build a source from a log; every sector written holds its request's seq plus one."""

    def make(
        log: Sequence[Event],
        *,
        notes: Sequence[tuple[int, NoteKind, int, str]] = (),
        events: int | None = None,
        base: bytes = b"\xfe" * (8 * SECTOR),
    ) -> MemorySource:
        table = table_of(log)
        writes = [
            bytes([seq + 1]) * event.count * SECTOR
            for seq, event in enumerate(log)
            if isinstance(event, Received) and event.command is Command.WRITE
        ]
        made = [Note(seq, seq * 10**6, kind, number, text) for seq, kind, number, text in notes]
        return MemorySource(
            table,
            len(base),
            len(log) if events is None else events,
            lambda: MemoryDisk(base),
            b"".join(writes),
            made,
        )

    return make

"""Why a request was not safe: one story for each answer there is."""

from __future__ import annotations

import pytest

from nbdproxy.crash.blame.flushes import Safety, blame
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.persistence.model import Options
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Log, Received, table_of

WRITE = Received(Command.WRITE, 0, 1)
FUA = Received(Command.WRITE, 0, 1, fua=True)
FLUSH = Received(Command.FLUSH)
GATE = Options(fsyncgate=True)

STORIES: list[tuple[Log, int, Options, Safety, int | None]] = [
    ([WRITE], 1, Options(), Safety.UNANSWERED, None),
    ([WRITE, Completed(0)], 1, Options(), Safety.UNANSWERED, None),
    ([WRITE, Completed(0, 5), FLUSH, Completed(2)], 4, Options(), Safety.REFUSED, None),
    ([WRITE, Completed(0)], 2, Options(), Safety.NEVER_FLUSHED, None),
    ([WRITE, Completed(0), FLUSH], 2, Options(), Safety.LATER, 2),
    ([WRITE, Completed(0), FLUSH], 3, Options(), Safety.IN_FLIGHT, 2),
    ([WRITE, Completed(0), FLUSH, Completed(2)], 3, Options(), Safety.IN_FLIGHT, 2),
    ([WRITE, Completed(0), FLUSH, Completed(2)], 4, Options(), Safety.BROKEN, 2),
    ([FUA, Completed(0)], 2, Options(), Safety.BROKEN, None),
    ([WRITE, Completed(0), FLUSH, Completed(2, 5)], 4, Options(), Safety.FAILED, 2),
    ([WRITE, Completed(0), FLUSH, Completed(2, 5), FLUSH], 5, Options(), Safety.IN_FLIGHT, 4),
    # What the failed flush had in hand is beyond the later one: that one is not to blame.
    ([WRITE, Completed(0), FLUSH, Completed(2, 5), FLUSH], 5, GATE, Safety.FAILED, 2),
    ([WRITE, Completed(0), FLUSH, Completed(2, 5), FLUSH, Completed(4)], 6, GATE,
     Safety.FAILED, 2),
    ([WRITE, Completed(0), FLUSH, Completed(2)], 4, Options(losses=(2,)), Safety.LOST, None),
    # A flush that was received before the write's reply does not cover it.
    ([WRITE, FLUSH, Completed(0), Completed(1)], 4, Options(), Safety.NEVER_FLUSHED, None),
]  # fmt: skip


@pytest.mark.parametrize(("log", "cut", "options", "safety", "flush"), STORIES)
def test_the_flush_to_blame(
    log: Log, cut: int, options: Options, safety: Safety, flush: int | None
) -> None:
    source = MemorySource(table_of(log), 512, len(log), lambda: MemoryDisk(512))
    found = blame(Timeline(source), 0, cut, options)
    assert (found.safety, found.flush) == (safety, flush)
    assert (found.delay_ns is not None) == (safety is Safety.LATER)
    assert found.delay_ns is None or found.delay_ns >= 0
    assert found.sentence()


def test_all_answers_have_a_story() -> None:
    assert {safety for *_, safety, _ in STORIES} == set(Safety)

"""A recording of any length is judged in a known number of bytes a request."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import numpy as np
import pytest

from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.persistence.model import Coverage, Level, Options
from nbdproxy.persistence.modes import recorded_under
from nbdproxy.recording.index import RequestTable
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource

COUNT = 200_000
BYTES_A_REQUEST = 100
"""The project's promise: under 100 MB for a million requests, the table included."""


def random_table(size: int, *, every: int) -> RequestTable:
    """Writes of 4 KiB all over a disk, a flush each `every` requests, answers up to 16 late."""
    random = np.random.default_rng(3)
    flush = np.arange(COUNT) % every == 0
    seq = np.arange(COUNT, dtype=np.int64) * 2
    return RequestTable(
        seq=seq,
        command=np.where(flush, Command.FLUSH, Command.WRITE).astype(np.uint8),
        flags=np.zeros(COUNT, np.uint16),
        connection=np.ones(COUNT, np.uint32),
        offset=np.where(flush, 0, random.integers(0, size // 4096, COUNT) * 4096),
        length=np.where(flush, 0, 4096),
        position=np.arange(COUNT, dtype=np.int64) * 4096,
        completed=seq + 1 + 2 * random.integers(0, 16, COUNT),
        error=np.zeros(COUNT, np.uint16),
    )


def peak_a_request(table: RequestTable, work: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    columns = sum(getattr(table, field.name).nbytes for field in fields(table))
    return float(peak + columns) / len(table)


@pytest.mark.parametrize("size", [1 << 28, 1 << 40], ids=["overwritten", "sparse"])
@pytest.mark.parametrize("level", [Level.FLUSHED, Level.FLUSHED_OR_FLUSHING, Level.RECEIVED])
def test_building_a_state_fits(size: int, level: Level) -> None:
    table = random_table(size, every=100)
    source = MemorySource(table, size, 2 * COUNT, lambda: MemoryDisk(0))
    exotic = Options(Coverage.RECEIVED, fsyncgate=True, multi_conn=False, losses=(COUNT,))
    for options in (Options(), exotic):
        state = StateId(2 * COUNT, level, Choice.MUST, options)
        found = peak_a_request(table, partial(open_state, source, state))
        assert found < BYTES_A_REQUEST, state


@pytest.mark.parametrize("every", [2, 100])
def test_telling_the_mode_fits(every: int) -> None:
    table = random_table(1 << 40, every=every)
    assert peak_a_request(table, lambda: recorded_under(table)) < BYTES_A_REQUEST

"""The table cache mode x failure, and onto which modes a recording may be projected."""

from __future__ import annotations

import pytest

from nbdproxy.errors import ProjectionError
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import (
    CACHED,
    THROUGH,
    CacheMode,
    Failure,
    check_projection,
    guarantee,
    projectable,
    recorded_under,
)
from nbdproxy.persistence.reference import Completed, Received, table_of
from nbdproxy.requests import Command

TABLE = """
                 none       writeback  writethrough directsync unsafe
guest-reset      received   received   received     received   received
guest-poweroff   received   received   received     received   received
qemu-kill        completed  completed  completed    completed  completed
host-power-loss  flushed    flushed    completed    completed  nothing
storage-loss     nothing    nothing    nothing      nothing    nothing
"""


def cells() -> list[tuple[CacheMode, Failure, Level]]:
    head, *lines = TABLE.strip().splitlines()
    modes = [CacheMode(word) for word in head.split()]
    return [
        (mode, Failure(line.split()[0]), Level(word))
        for line in lines
        for mode, word in zip(modes, line.split()[1:], strict=True)
    ]


@pytest.mark.parametrize(("mode", "failure", "level"), cells())
def test_the_table(mode: CacheMode, failure: Failure, level: Level) -> None:
    assert guarantee(mode, failure).must is level


def test_the_table_is_complete() -> None:
    assert len(cells()) == len(CacheMode) * len(Failure)


@pytest.mark.parametrize("mode", CacheMode)
def test_a_failed_exit_flush_matters_to_a_poweroff_alone(mode: CacheMode) -> None:
    for failure in Failure:
        without = guarantee(mode, failure)
        with_it = guarantee(mode, failure, exit_flush_failed=True)
        if failure is Failure.GUEST_POWEROFF:
            assert with_it.must is Level.FLUSHED
        else:
            assert with_it == without


def steps(*requests: Received) -> list[Received | Completed]:
    """Each request answered before the next is received."""
    log: list[Received | Completed] = []
    for request in requests:
        log += [request, Completed(len(log))]
    return log


WRITE = Received(Command.WRITE, 0, 1)
FUA = Received(Command.WRITE, 0, 1, fua=True)
FLUSH = Received(Command.FLUSH)


def test_all_writes_with_fua_mean_a_mode_without_cache() -> None:
    assert recorded_under(table_of(steps(FUA, FUA, FLUSH))) == THROUGH


def test_one_write_without_fua_means_a_cache() -> None:
    assert recorded_under(table_of(steps(FUA, WRITE, FLUSH))) == CACHED


def test_a_flush_after_each_write_means_a_mode_without_cache() -> None:
    assert recorded_under(table_of(steps(*[WRITE, FLUSH] * 8))) == THROUGH


def test_for_writes_in_parallel_the_flushes_may_come_afterwards() -> None:
    assert recorded_under(table_of(steps(*[WRITE] * 10, *[FLUSH] * 9))) == THROUGH
    assert recorded_under(table_of(steps(*[WRITE] * 10, *[FLUSH] * 8))) == CACHED


def test_seven_such_writes_are_too_few_to_tell() -> None:
    assert recorded_under(table_of(steps(*[WRITE, FLUSH] * 7))) == CACHED


def test_a_guest_that_flushes_two_writes_at_a_time_has_a_cache() -> None:
    assert recorded_under(table_of(steps(*[WRITE, WRITE, FLUSH] * 8))) == CACHED


def test_what_failed_does_not_count() -> None:
    log = [*steps(*[WRITE, FLUSH] * 7), WRITE, FLUSH, Completed(28, 5), Completed(29, 5)]
    assert recorded_under(table_of(log)) == CACHED


def test_nothing_written_tells_nothing() -> None:
    assert recorded_under(table_of(steps(FLUSH))) == CACHED | THROUGH


def test_what_the_user_states_decides() -> None:
    table = table_of(steps(*[WRITE, FLUSH] * 8))
    assert recorded_under(table, CacheMode.WRITEBACK) == CACHED
    assert recorded_under(table, CacheMode.DIRECTSYNC) == THROUGH


def test_a_recording_with_flushes_goes_onto_every_mode() -> None:
    assert projectable(CACHED) == tuple(CacheMode)
    check_projection(CACHED, CacheMode)


def test_a_recording_without_flushes_goes_onto_two() -> None:
    assert set(projectable(THROUGH)) == THROUGH
    check_projection(THROUGH, THROUGH)
    with pytest.raises(ProjectionError, match="nothing about none, unsafe: record again"):
        check_projection(THROUGH, [CacheMode.NONE, CacheMode.DIRECTSYNC, CacheMode.UNSAFE])

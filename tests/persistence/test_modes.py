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
    recorded_under,
)
from nbdproxy.requests import Command
from tests.support.persistence_reference import Completed, Received, table_of

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
    assert guarantee(mode, failure) is level


def test_the_table_is_complete() -> None:
    assert len(cells()) == len(CacheMode) * len(Failure)


@pytest.mark.parametrize("mode", CacheMode)
def test_a_failed_exit_flush_matters_to_a_poweroff_alone(mode: CacheMode) -> None:
    for failure in Failure:
        without = guarantee(mode, failure)
        with_it = guarantee(mode, failure, exit_flush_failed=True)
        if failure is Failure.GUEST_POWEROFF:
            assert with_it is Level.FLUSHED
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


def test_all_writes_with_fua_may_be_qemus_or_a_programs() -> None:
    taken = recorded_under(table_of(steps(FUA, FUA, FLUSH)), offers_fua=True)
    assert taken.modes == CACHED | THROUGH
    assert set(taken.tells) == THROUGH
    assert "cannot be told" in taken.why


def test_one_write_without_fua_means_a_cache() -> None:
    taken = recorded_under(table_of(steps(FUA, WRITE, FLUSH)))
    assert taken.modes == CACHED
    assert taken.tells == tuple(CacheMode)
    assert not taken.why
    assert not taken.remark


@pytest.mark.parametrize("count", [1, 20, 500])
def test_a_flush_for_each_write_is_the_guests_own_where_fua_was_offered(count: int) -> None:
    taken = recorded_under(table_of(steps(*[WRITE, FLUSH] * count)), offers_fua=True)
    assert taken.modes == CACHED
    assert taken.tells == tuple(CacheMode)
    assert "--recorded-as writethrough" in taken.remark


@pytest.mark.parametrize("offers_fua", [False, None])
@pytest.mark.parametrize("count", [1, 20, 500])
def test_without_fua_it_cannot_be_told_who_flushes_each_write(
    count: int, offers_fua: bool | None
) -> None:
    taken = recorded_under(table_of(steps(*[WRITE, FLUSH] * count)), offers_fua=offers_fua)
    assert taken.modes == CACHED | THROUGH
    assert set(taken.tells) == THROUGH
    assert "a program syncs each write; which it was cannot be told" in taken.why


def test_for_writes_in_parallel_the_flushes_may_come_afterwards() -> None:
    assert recorded_under(table_of(steps(*[WRITE] * 10, *[FLUSH] * 9))).modes == CACHED | THROUGH
    assert recorded_under(table_of(steps(*[WRITE] * 10, *[FLUSH] * 8))).modes == CACHED


def test_a_guest_that_flushes_two_writes_at_a_time_has_a_cache() -> None:
    assert recorded_under(table_of(steps(*[WRITE, WRITE, FLUSH] * 8))).modes == CACHED


@pytest.mark.parametrize("below_qcow2", [True, None])
@pytest.mark.parametrize(("writes", "flushes"), [(140, 113), (142, 114), (4, 2)])
def test_below_qcow2_writethrough_hides_among_the_tables(
    writes: int, flushes: int, below_qcow2: bool | None
) -> None:
    """The figures were seen with QEMU 7.2 under writethrough and directsync."""
    table = table_of(steps(*[WRITE] * writes, *[FLUSH] * flushes))
    taken = recorded_under(table, offers_fua=True, below_qcow2=below_qcow2)
    assert taken.modes == CACHED | THROUGH
    assert set(taken.tells) == THROUGH


@pytest.mark.parametrize("stated", [None, CacheMode.NONE])
def test_below_qcow2_a_cached_recording_lacks_tables_that_writethrough_writes(
    stated: CacheMode | None,
) -> None:
    table = table_of(steps(*[WRITE] * 106, *[FLUSH] * 4))
    taken = recorded_under(table, stated, offers_fua=True, below_qcow2=True)
    assert taken.modes == set(taken.tells) == CACHED
    assert "below qcow2" in taken.why


def test_what_failed_does_not_count() -> None:
    log = [*steps(WRITE, WRITE, FLUSH), FLUSH, Completed(6, 5)]
    assert recorded_under(table_of(log)).modes == CACHED


def test_nothing_written_tells_nothing_and_projects_onto_all() -> None:
    taken = recorded_under(table_of(steps(FLUSH)))
    assert taken.modes == CACHED | THROUGH
    assert taken.tells == tuple(CacheMode)


def test_what_the_user_states_decides() -> None:
    table = table_of(steps(*[WRITE, FLUSH] * 8))
    assert recorded_under(table, CacheMode.WRITEBACK).tells == tuple(CacheMode)
    assert recorded_under(table, CacheMode.WRITEBACK).modes == CACHED
    assert recorded_under(table, CacheMode.DIRECTSYNC).modes == THROUGH
    assert set(recorded_under(table, CacheMode.DIRECTSYNC).left_out) == CACHED


def test_a_projection_is_refused_with_what_can_be_asked_instead() -> None:
    table = table_of(steps(WRITE, WRITE, FLUSH))
    check_projection(recorded_under(table), CacheMode)
    unclear = recorded_under(table_of(steps(FUA)))
    check_projection(unclear, THROUGH)
    with pytest.raises(ProjectionError, match=r"none, unsafe: every write .* --recorded-as"):
        check_projection(unclear, [CacheMode.NONE, CacheMode.DIRECTSYNC, CacheMode.UNSAFE])
    below = recorded_under(table, CacheMode.NONE, below_qcow2=True)
    with pytest.raises(ProjectionError, match=r"--mode none,writeback,unsafe$"):
        check_projection(below, [CacheMode.DIRECTSYNC])

"""One directed test for each rule of docs/persistence.md, on the model and on the reference alike.

Logs are written as transcripts; an event's index is its seq. `ok(n)` answers event n.
"""

from __future__ import annotations

from nbdproxy.persistence.model import DEFAULTS, Coverage, Durability, Level, Options
from nbdproxy.recording.index import Mask, RequestTable
from nbdproxy.requests import Command
from tests.support import persistence_reference as reference
from tests.support.persistence_reference import BASE, ZERO, Completed, Log, Received, allowed

GENEROUS = Options(coverage=Coverage.REPLIED)
FSYNCGATE = Options(fsyncgate=True)
ALONE = Options(multi_conn=False)
ALL = slice(None)


def write(first: int = 0, count: int = 1, *, fua: bool = False, connection: int = 1) -> Received:
    return Received(Command.WRITE, first, count, fua, connection)


def zeroes(first: int = 0, count: int = 1) -> Received:
    return Received(Command.WRITE_ZEROES, first, count)


def trim(first: int = 0, count: int = 1) -> Received:
    return Received(Command.TRIM, first, count)


def flush(connection: int = 1) -> Received:
    return Received(Command.FLUSH, connection=connection)


def ok(request: int) -> Completed:
    return Completed(request)


def fail(request: int) -> Completed:
    return Completed(request, error=5)


def seqs(table: RequestTable, mask: Mask) -> set[int]:
    return set(table.seq[mask].tolist())


def durable(log: Log, options: Options = DEFAULTS, t: int | None = None) -> set[int]:
    """What model and reference agree to be durable at t, or at the end."""
    t = len(log) if t is None else t
    table = reference.table_of(log)
    found = seqs(table, Durability(table, options).durable_from < t)
    assert found == reference.durable(log, t, options)
    return found


def kept(log: Log, level: Level, options: Options = DEFAULTS) -> set[int]:
    table = reference.table_of(log)
    found = seqs(table, Durability(table, options).kept(ALL, len(log), level))
    assert found == reference.kept(log, len(log), level, options)
    return found


def sector(log: Log, level: Level = Level.FLUSHED) -> set[int]:
    return set(allowed(log, len(log), 1, level=level)[0])


def test_rule_01_a_flush_covers_what_was_completed_before_it_was_received() -> None:
    early_and_late: Log = [write(0), ok(0), write(1), flush(), ok(2), ok(3)]
    assert durable(early_and_late) == {0}
    assert durable(early_and_late, GENEROUS) == {0, 2}


def test_rule_01_generous_coverage_ends_at_the_reply() -> None:
    assert durable([write(), flush(), ok(1), ok(0)], GENEROUS) == set()


def test_rule_02_durable_is_what_flushes_and_fua_made_so_by_then() -> None:
    log: Log = [write(0), ok(0), flush(), ok(2), write(1, fua=True), ok(4), write(2), ok(6)]
    assert durable(log, t=3) == set()
    assert durable(log, t=4) == {0}
    assert durable(log, t=5) == {0}
    assert durable(log) == {0, 4}


def test_rule_03_a_flush_in_flight_guarantees_nothing() -> None:
    log: Log = [write(), ok(0), flush()]
    assert durable(log) == set()
    assert kept(log, Level.FLUSHED_OR_FLUSHING) == {0}


def test_rule_04_fua_makes_its_own_extent_durable_and_nothing_else() -> None:
    assert durable([write(0), ok(0), write(1, fua=True), ok(2)]) == {2}
    assert durable([write(0, fua=True)]) == set()


def test_rule_04_fua_orders_nothing_else() -> None:
    log: Log = [write(), write(fua=True), ok(1)]
    assert sector(log) == {0, 1}


def test_rule_05_the_most_that_may_be_there_is_what_was_received_and_did_not_fail() -> None:
    log: Log = [write(0), ok(0), flush(), ok(2), write(1), ok(4), write(2), fail(6), write(3)]
    durability = Durability(reference.table_of(log))
    assert seqs(durability.table, durability.sent(ALL, len(log))) == {0, 4, 8}
    assert seqs(durability.table, durability.sent(ALL, 7)) == {0, 4, 6}


def test_rule_06_without_a_durable_write_the_base_may_show() -> None:
    assert sector([write(), ok(0), write()]) == {BASE, 0, 2}


def test_rule_06_a_durable_write_hides_what_happened_before_it() -> None:
    log: Log = [write(), ok(0), write(), ok(2), flush(), ok(4), write()]
    assert sector(log) == {2, 6}


def test_rule_06_overlapping_concurrent_writes_land_in_either_order() -> None:
    both: Log = [write(), write(), ok(0), ok(1), flush(), ok(4)]
    assert sector(both) == {0, 1}


def test_rule_06_sectors_are_decided_one_by_one() -> None:
    log: Log = [write(0, 2), ok(0), flush(), ok(2), write(1, 2)]
    assert allowed(log, len(log), 4) == [
        frozenset({0}),
        frozenset({0, 4}),
        frozenset({BASE, 4}),
        frozenset({BASE}),
    ]


def test_rule_07_a_request_is_not_atomic() -> None:
    log: Log = [write(0, 2)]
    assert allowed(log, 1, 2) == [frozenset({BASE, 0})] * 2


def test_rule_08_write_zeroes_is_a_write() -> None:
    log: Log = [write(), ok(0), zeroes(), ok(2), flush(), ok(4)]
    assert durable(log) == {0, 2}
    assert sector(log) == {ZERO}


def test_rule_09_a_durable_trim_leaves_zeroes_or_what_was_there() -> None:
    log: Log = [write(), ok(0), trim(), ok(2), flush(), ok(4)]
    assert durable(log) == {0, 2}
    assert sector(log) == {0, ZERO}


def test_rule_09_a_write_ends_the_uncertainty_of_a_trim() -> None:
    log: Log = [trim(), ok(0), write(), ok(2), flush(), ok(4)]
    assert sector(log) == {2}


def test_rule_10_a_failed_flush_covers_nothing() -> None:
    log: Log = [write(), ok(0), flush(), fail(2)]
    assert durable(log) == set()
    assert durable([*log, flush(), ok(4)]) == {0}


def test_rule_10_fsyncgate_never_brings_back_what_a_failed_flush_had_in_hand() -> None:
    log: Log = [write(0), ok(0), flush(), fail(2), write(1), ok(4), flush(), ok(6)]
    assert durable(log, FSYNCGATE) == {4}
    assert kept(log, Level.COMPLETED, FSYNCGATE) == {4}
    assert kept(log, Level.COMPLETED) == {0, 4}


def test_rule_10_fsyncgate_spares_what_was_safe_before() -> None:
    log: Log = [write(), ok(0), flush(), ok(2), flush(), fail(4)]
    assert durable(log, FSYNCGATE) == {0}


def test_rule_11_coverage_stays_on_its_connection_without_multi_conn() -> None:
    log: Log = [write(0), ok(0), write(1, connection=2), ok(2), flush(2), ok(4)]
    assert durable(log) == {0, 2}
    assert durable(log, ALONE) == {2}
    assert kept(log[:-1], Level.FLUSHED_OR_FLUSHING, ALONE) == {2}


def test_rule_12_a_loss_takes_what_was_completed_and_not_flushed() -> None:
    log: Log = [write(0), ok(0), flush(), ok(2), write(1), ok(4), flush(), ok(6)]
    assert durable(log, Options(losses=(6,))) == {0}
    assert kept(log, Level.COMPLETED, Options(losses=(6,))) == {0}
    assert kept(log, Level.RECEIVED, Options(losses=(6,))) == {0}


def test_rule_12_a_loss_during_a_flush_comes_before_its_reply() -> None:
    log: Log = [write(), ok(0), flush(), ok(2)]
    assert durable(log, Options(losses=(3,))) == set()
    assert durable(log, Options(losses=(4,))) == {0}


def test_rule_12_fua_is_beyond_a_loss() -> None:
    log: Log = [write(fua=True), ok(0), flush(), ok(2)]
    assert durable(log, Options(losses=(2,))) == {0}


def test_an_error_is_never_durable() -> None:
    log: Log = [write(), fail(0), write(fua=True), fail(2), flush(), ok(4)]
    assert durable(log) == set()
    for level in Level:
        assert kept(log, level) == set()


def test_an_empty_recording_has_empty_answers() -> None:
    table = reference.table_of([])
    for level in Level:
        assert not Durability(table).kept(ALL, 0, level).size

"""Every way to name an instant, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdproxy.crash.states.cuts import resolve
from nbdproxy.errors import UsageError
from nbdproxy.recording.notes import NoteKind
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received

MakeSource = Callable[..., MemorySource]
Log = list[Received | Completed]

WRITE = Received(Command.WRITE, 0, 1)
FLUSH = Received(Command.FLUSH)
LOG: Log = [
    *(WRITE, Completed(0), FLUSH, Completed(2)),
    *(FLUSH, Completed(4, error=5), FLUSH, FLUSH, Completed(7), Completed(6)),
]


def at(source: MemorySource, text: str) -> int:
    return resolve(source, text).position


def test_end_is_behind_the_last_event(make_source: MakeSource) -> None:
    assert at(make_source(LOG, events=12), "end") == 12


def test_seq_is_just_after_the_event(make_source: MakeSource) -> None:
    assert at(make_source(LOG), "seq:0") == 1
    assert at(make_source(LOG), "seq:9") == 10


def test_flush_counts_those_that_succeeded_as_they_completed(make_source: MakeSource) -> None:
    source = make_source(LOG)
    assert [at(source, f"flush:{n}") for n in (1, 2, 3)] == [4, 9, 10]


@pytest.mark.parametrize(
    ("text", "position"), [("0s", 1), ("3ms", 4), (".0035", 4), ("0.009s", 10), ("3000us", 4)]
)
def test_time_is_after_what_happened_by_then(
    make_source: MakeSource, text: str, position: int
) -> None:
    assert at(make_source(LOG), f"time:{text}") == position


def test_mark_is_the_last_of_its_name(make_source: MakeSource) -> None:
    notes = [(1, NoteKind.MARK, 0, "a"), (5, NoteKind.MARK, 0, "b"), (8, NoteKind.MARK, 0, "a")]
    source = make_source(LOG, notes=notes)
    assert at(source, "mark:b") == 6
    assert resolve(source, "mark:a").position == 9
    assert resolve(source, "mark:a").note == "the last of 2 marks of that name"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seq:10", "10 events; use seq:0 to seq:9"),
        ("seq:x", "10 events"),
        ("flush:0", "3 flushes that succeeded; use flush:1 to flush:3"),
        ("flush:4", "3 flushes that succeeded"),
        ("time:1s", "ends after 0.009s"),
        ("time:soon", "write time:12.5s"),
        ("mark:c", "marks are: a"),
        ("mark:", "names no instant"),
        ("now", "use end, before-exit, riskiest, seq:N"),
    ],
)
def test_what_is_not_there_is_said(make_source: MakeSource, text: str, says: str) -> None:
    source = make_source(LOG, notes=[(1, NoteKind.MARK, 0, "a")])
    with pytest.raises(UsageError, match=says):
        resolve(source, text)


def test_a_recording_without_events_says_so(make_source: MakeSource) -> None:
    source = make_source([])
    assert at(source, "end") == 0
    with pytest.raises(UsageError, match="only end"):
        resolve(source, "seq:0")
    with pytest.raises(UsageError, match="0 flushes"):
        resolve(source, "flush:1")


EXIT: Log = [WRITE, Completed(0), FLUSH, Completed(2), FLUSH, Completed(4), FLUSH, Completed(6)]
CONNECT = (0, NoteKind.CONNECT, 1, "")
DISC = (8, NoteKind.DISC, 1, "")


def test_before_exit_sets_two_flushes_aside_and_never_a_third(make_source: MakeSource) -> None:
    cut = resolve(make_source(EXIT, notes=[CONNECT, DISC], events=9), "before-exit")
    assert cut.position == 4
    assert cut.note.startswith("2 flushes before DISC set aside as QEMU's own; if this was")
    assert not cut.matters, "the guest had flushed all before"


@pytest.mark.parametrize(
    ("log", "ending", "matters"),
    [
        ([*EXIT[:6]], NoteKind.DISC, True),
        ([*EXIT], NoteKind.DISC, False),
        ([*EXIT[:4]], NoteKind.DISC, True),
        ([*EXIT[:4]], NoteKind.EOF, True),
        ([*EXIT[:4], WRITE, Completed(4)], NoteKind.DISC, False),
        ([*EXIT[:4], WRITE, Completed(4), FLUSH, Completed(6)], NoteKind.DISC, True),
        ([*EXIT[:2]], NoteKind.EOF, False),
        ([], NoteKind.EOF, False),
    ],
)
def test_what_is_said_of_before_exit_matters_where_it_changes_what_was_flushed(
    make_source: MakeSource, log: Log, ending: NoteKind, *, matters: bool
) -> None:
    source = make_source(log, notes=[CONNECT, (len(log), ending, 1, "")])
    assert resolve(source, "before-exit").matters is matters


def test_before_exit_is_exact_with_a_shutdown_event(make_source: MakeSource) -> None:
    shutdown = '{"event": "SHUTDOWN", "data": {"guest": true}}'
    notes = [
        CONNECT,
        (1, NoteKind.QMP, 0, shutdown),
        (3, NoteKind.QMP, 0, shutdown),
        (5, NoteKind.QMP, 0, '{"event": "STOP"}'),
        (6, NoteKind.QMP, 0, "SHUTDOWN"),
        DISC,
    ]
    cut = resolve(make_source(EXIT, notes=notes, events=9), "before-exit")
    assert (cut.position, cut.note) == (3, "QEMU's SHUTDOWN event")


def test_before_exit_is_the_end_where_qemu_was_killed(make_source: MakeSource) -> None:
    cut = resolve(make_source(EXIT, notes=[CONNECT, (8, NoteKind.EOF, 1, "")]), "before-exit")
    assert cut.position == 8
    assert "did not end in DISC" in cut.note


def test_before_exit_looks_at_the_last_connection(make_source: MakeSource) -> None:
    notes = [CONNECT, DISC, (9, NoteKind.CONNECT, 2, "")]
    cut = resolve(make_source(EXIT, notes=notes, events=10), "before-exit")
    assert cut.position == 10


@pytest.mark.parametrize(
    "log",
    [
        [WRITE, Completed(0), FLUSH, Completed(2)],
        [FLUSH, Completed(0), FLUSH, Completed(2, error=5)],
        [FLUSH, Completed(0), FLUSH],
        [FLUSH, Completed(0), FLUSH, Completed(2), WRITE, Completed(4)],
        [FLUSH, Completed(0)],
    ],
)
def test_before_exit_takes_no_less_than_two_good_flushes(make_source: MakeSource, log: Log) -> None:
    source = make_source(log, notes=[CONNECT, (len(log), NoteKind.DISC, 1, "")])
    cut = resolve(source, "before-exit")
    assert cut.position == len(log)
    assert "nothing was set aside" in cut.note


def test_the_riskiest_instant_is_the_first_with_the_most_bytes_waiting(
    make_source: MakeSource,
) -> None:
    two, one = Received(Command.WRITE, 0, 2), Received(Command.WRITE, 4, 1)
    log: Log = [two, Completed(0), one, Completed(2), FLUSH, Completed(4), two, Completed(6)]
    source = make_source(log)
    assert at(source, "riskiest") == 4  # three sectors wait, just before the flush is received
    assert "1,536 bytes" in resolve(source, "riskiest").note
    assert at(make_source([*log, one, Completed(8), one, Completed(10)]), "riskiest") == 12


def test_without_writes_nothing_is_risky(make_source: MakeSource) -> None:
    assert at(make_source([FLUSH, Completed(0)]), "riskiest") == 2

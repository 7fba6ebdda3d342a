"""Law: a play keeps the recording's order, and nothing is in flight where that would do harm.

Requests are told apart by their seq, as in the log; `steps` are (seq, is_wait, cut) in order.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.persistence.modes import THROUGH, CacheMode
from nbdproxy.reenactment.schedule import Schedule, schedule
from nbdproxy.requests import Command
from tests.support.logs import logs
from tests.support.persistence_reference import Completed, Received, table_of

Log = list[Received | Completed]
Steps = list[tuple[int, bool, int]]
AT_END = 1 << 30


class Case:
    """A log, its schedule, and where in it each request is sent and waited for."""

    def __init__(self, log: Log, mode: CacheMode, cuts: set[int]) -> None:
        self.log = log
        self.mode = mode
        self.cuts = {*cuts, len(log)}
        table = table_of(log)
        self.plan: Schedule = schedule(table, mode, events=len(log), cuts=cuts)
        seqs = table.seq.tolist()
        steps = [(seqs[one.row], one.is_wait, one.cut) for one in self.plan.steps(table)]
        assert len(set(steps)) == len(steps) == len(self.plan)
        self.sent = {seq: at for at, (seq, is_wait, _) in enumerate(steps) if not is_wait}
        self.answered = {seq: at for at, (seq, is_wait, _) in enumerate(steps) if is_wait}
        self.cut_of = [cut for _, _, cut in steps]
        self.done = {
            event.request: AT_END if event.error else seq
            for seq, event in enumerate(log)
            if isinstance(event, Completed)
        }
        self.failed = {e.request for e in log if isinstance(e, Completed) and e.error}

    def request(self, seq: int) -> Received:
        """The request that was received at a position."""
        event = self.log[seq]
        assert isinstance(event, Received)
        return event

    def completed(self, seq: int) -> int:
        """Where a request was completed."""
        return self.done.get(seq, AT_END)

    def is_alone(self, seq: int) -> bool:
        """Whether a request makes others durable."""
        request = self.request(seq)
        flushes = request.command is Command.FLUSH or request.fua
        return flushes and self.mode not in THROUGH

    def overlap(self, one: int, other: int) -> bool:
        """Whether two requests touch the same sector."""
        a, b = self.request(one), self.request(other)
        return a.first < b.first + b.count and b.first < a.first + a.count

    def pushed(self, seq: int) -> bool:
        """Whether a request had to be sent early because a later one that overlaps was."""
        return any(
            other > seq and other < self.completed(seq) and self.overlap(seq, other)
            for other in self.sent
        )


cases = st.builds(
    Case,
    logs(40),
    st.sampled_from([CacheMode.NONE, CacheMode.UNSAFE, CacheMode.WRITETHROUGH]),
    st.sets(st.integers(0, 20), max_size=3),
).filter(lambda case: max(case.cuts) <= len(case.log))


@given(cases)
@settings(max_examples=150, deadline=None)
def test_what_succeeded_is_sent_and_waited_for_once(case: Case) -> None:
    received = {seq for seq, event in enumerate(case.log) if isinstance(event, Received)}
    flushes = {seq for seq in received if case.request(seq).command is Command.FLUSH}
    expected = received - case.failed - (flushes if case.mode in THROUGH else set())
    assert set(case.sent) == set(case.answered) == expected
    for seq in expected:
        assert case.sent[seq] < case.answered[seq]
        assert case.cut_of[case.sent[seq]] > seq, "it is not sent before it was received"
        assert case.cut_of[case.answered[seq]] <= case.completed(seq) + 1
    assert case.cut_of == sorted(case.cut_of)


@given(cases)
@settings(max_examples=150, deadline=None)
def test_what_was_one_after_the_other_is_so_again(case: Case) -> None:
    for one in case.sent:
        for other in case.sent:
            if case.completed(one) < other or (one < other and case.overlap(one, other)):
                assert case.answered[one] < case.sent[other]


@given(cases)
@settings(max_examples=150, deadline=None)
def test_a_flush_is_alone_and_covers_what_was_completed_before_it(case: Case) -> None:
    for flush in filter(case.is_alone, case.sent):
        assert case.answered[flush] == case.sent[flush] + 1
        for other in case.sent:
            if other == flush:
                continue
            is_before = case.answered[other] < case.sent[flush]
            assert is_before or case.sent[other] > case.answered[flush]
            if not case.is_alone(other) and not case.pushed(other):
                assert is_before is (case.completed(other) < flush)


@given(cases)
@settings(max_examples=150, deadline=None)
def test_exact_is_where_only_what_was_answered_had_been_sent(case: Case) -> None:
    for cut in range(len(case.log) + 1):
        ahead = [
            seq
            for seq, at in case.sent.items()
            if case.cut_of[at] <= cut and case.completed(seq) >= cut
        ]
        assert case.plan.exact[cut] == (not ahead)
        if cut in case.cuts:
            assert all(case.is_alone(seq) or case.pushed(seq) for seq in ahead)


@given(logs(40))
@settings(max_examples=100, deadline=None)
def test_where_every_cut_shall_be_exact_one_is_in_flight_at_most(log: Log) -> None:
    case = Case(log, CacheMode.NONE, set(range(len(log) + 1)))
    for seq, at in case.sent.items():
        if case.completed(seq) != AT_END:
            assert case.answered[seq] == at + 1

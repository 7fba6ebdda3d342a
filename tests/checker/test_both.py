"""What is made of two oracles' words, and of a checker's exit code; without a guest."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from nbdproxy.checker.both import BothOracles, Pair
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Fsck
from nbdproxy.oracles.fsck import concluded
from nbdproxy.oracles.watched import Reads

SIZE = 4096


def test_where_the_two_differ_is_noted_and_what_one_cannot_tell_is_not() -> None:
    both = BothOracles()
    both.state = "s1"
    whole, lost = Condition.WHOLE, Condition.MISSING
    quick = Findings(
        Verdict.UNKNOWN, {"/a": lost, "/b": Condition.CANNOT_BE_TOLD, "/c": whole}, "/b: encrypted"
    )
    both.note(quick, Findings(Verdict.PASS, {"/a": whole, "/b": whole, "/c": whole}))
    both.note(Findings(Verdict.UNKNOWN, reason="?"), quick)
    assert both.differences == [("s1", "/a", lost, whole)]
    assert both.compared == 1


class Says:
    """A follower that says the same of every state, and that it read some of it."""

    def __init__(self, findings: Findings, reads: Reads | None = None) -> None:
        self.findings = findings
        self.reads = reads

    def check(
        self,
        device: ReadableDevice,  # noqa: ARG002
        changed: Iterable[Extent] | None,  # noqa: ARG002
    ) -> Findings:
        return self.findings


def test_what_both_read_is_told_in_order() -> None:
    """Whoever shares verdicts between states looks it up by bisection."""
    passed = Findings(Verdict.PASS, {"/a": Condition.WHOLE})
    quick, kernel = Says(passed, Reads([(0, 8), (512, 520)])), Says(passed, Reads([(4, 16)]))
    found = Pair(BothOracles(), quick, kernel).reads
    assert found is not None and found.ranges() == [(0, 16), (512, 520)]


def test_what_the_quick_oracle_alone_calls_whole_does_not_pass() -> None:
    whole = {"/a": Condition.WHOLE}
    silent = Says(Findings(Verdict.UNKNOWN, reason="the guest is gone"))
    found = Pair(BothOracles(), Says(Findings(Verdict.PASS, whole)), silent)
    said = found.check(MemoryDisk(SIZE), None)
    assert (said.verdict, said.conditions) == (Verdict.UNKNOWN, whole)
    assert said.reason is not None and "the guest is gone" in said.reason
    lost = Findings(Verdict.FAIL, {"/a": Condition.MISSING})
    assert Pair(BothOracles(), Says(lost), silent).check(MemoryDisk(SIZE), None) == lost


@pytest.mark.parametrize(
    ("program", "code"),
    [
        *(("e2fsck", code) for code in (-1, -6, 8, 16, 32, 128, 134)),
        *((program, 2) for program in ("xfs_repair", "btrfs", "fsck.fat", "ntfsresize")),
    ],
)
def test_a_checker_that_failed_itself_found_nothing(program: str, code: int) -> None:
    found = concluded(program, code, f"{program} 1.47\nNot enough memory\n")
    assert found.clean is None
    assert found.said.endswith("Not enough memory")


@pytest.mark.parametrize(
    ("program", "code"),
    [
        *(("e2fsck", code) for code in (1, 4, 6, 12, 20, 36)),
        *((program, 1) for program in ("xfs_repair", "btrfs", "fsck.fat", "ntfsresize")),
    ],
)
def test_errors_that_were_found_are_told_whatever_else_went_wrong(program: str, code: int) -> None:
    assert concluded(program, code, f"{program} 1\na wrong count\n") == Fsck(False, "a wrong count")

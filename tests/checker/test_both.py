"""What is made of two oracles' words, and of a checker's exit code; without a guest."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from nbdproxy.checker.both import BothChecks, BothOracles
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import FileCheck, Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Fsck
from nbdproxy.oracles.fsck import concluded
from nbdproxy.oracles.watched import RangeSet

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

    def __init__(self, findings: Findings, reads: RangeSet | None = None) -> None:
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
    quick, kernel = Says(passed, RangeSet([(0, 8), (512, 520)])), Says(passed, RangeSet([(4, 16)]))
    found = BothChecks(BothOracles(), quick, kernel).reads
    assert found is not None and found.ranges() == [(0, 16), (512, 520)]


@pytest.mark.parametrize("alone", [Condition.WHOLE, Condition.MISSING])
def test_what_the_quick_oracle_alone_tells_cannot_be_told(alone: Condition) -> None:
    """Neither a pass nor a loss, for which somebody would be blamed."""
    silent = Says(Findings(Verdict.UNKNOWN, reason="the guest is gone"))
    verdict = Verdict.PASS if alone is Condition.WHOLE else Verdict.FAIL
    quick = Says(Findings(verdict, {"/a": alone}))
    said = BothChecks(BothOracles(), quick, silent).check(MemoryDisk(SIZE), None)
    assert said.conditions == {"/a": Condition.CANNOT_BE_TOLD}
    assert said.verdict is Verdict.UNKNOWN
    assert said.reason is not None and f"1 {alone.value}: the guest is gone" in said.reason


def test_where_both_cannot_tell_of_any_file_nothing_is_said_of_files() -> None:
    """So that a blank disk can be told by whoever looks at that."""
    quick, kernel = (Findings(Verdict.UNKNOWN, reason=reason) for reason in ("no", "nothing"))
    assert (
        BothChecks(BothOracles(), Says(quick), Says(kernel)).check(MemoryDisk(SIZE), None) is kernel
    )


WHOLE, MISSING, ZEROED = Condition.WHOLE, Condition.MISSING, Condition.ZEROED
CANNOT = Condition.CANNOT_BE_TOLD


@pytest.mark.parametrize(
    ("quick", "kernel", "made", "verdict"),
    [
        (WHOLE, WHOLE, WHOLE, Verdict.PASS),
        (MISSING, MISSING, MISSING, Verdict.FAIL),
        (WHOLE, MISSING, CANNOT, Verdict.UNKNOWN),
        (MISSING, WHOLE, CANNOT, Verdict.UNKNOWN),
        (ZEROED, MISSING, MISSING, Verdict.FAIL),
        (CANNOT, WHOLE, WHOLE, Verdict.PASS),
        (CANNOT, MISSING, MISSING, Verdict.FAIL),
        (WHOLE, CANNOT, CANNOT, Verdict.UNKNOWN),
        (MISSING, CANNOT, CANNOT, Verdict.UNKNOWN),
    ],
)
def test_what_is_made_of_two_words_on_one_file(
    quick: Condition, kernel: Condition, made: Condition, verdict: Verdict
) -> None:
    said = [
        Says(Findings(FileCheck(one).verdict, {"/a": one, "/b": WHOLE})) for one in (quick, kernel)
    ]
    both = BothOracles()
    found = BothChecks(both, *said).check(MemoryDisk(SIZE), None)
    assert (found.verdict, found.conditions) == (verdict, {"/a": made, "/b": WHOLE})
    if both.differences:
        assert f"the kernel finds /a {kernel.value}, the quick oracle {quick.value}" in str(
            found.reason
        )


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

"""What an exploration found, for people and for programs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nbdproxy.crash.explore.explore import Tally
from nbdproxy.crash.explore.judging import JudgePlan
from nbdproxy.crash.explore.planning import ExplorationPlan, states_text
from nbdproxy.crash.explore.stages import BEYOND, Stage
from nbdproxy.crash.explore.verdicts import CHECKED, SAME_CONTENT, SAME_READS, About, Row, Verdicts
from nbdproxy.oracles.check import Verdict

SHOWN = 5
"""Failing states that the text lists; the database has all of them."""


@dataclass(frozen=True, slots=True)
class ExplorationReport:
    """One exploration: what was asked for, what was planned, and what came of it.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     found = case.explore(ExploreRequest(states=20, workers=1))
    ...     failing = found.failing()
    >>> found.tally.visited, len(failing) > 0
    (20, True)
    """

    about: About
    plan: ExplorationPlan
    tally: Tally
    verdicts: Verdicts
    missing: str | None
    """What the recording lacks, if anything."""

    def failing(self, limit: int = 100) -> list[str]:
        """Return the ids of states that fail, those that tell most first, at most so many."""
        return [row.state for row in self.verdicts.telling(limit)]

    @property
    def complete(self) -> int:
        """At how many cuts all states of the model were visited."""
        seen = self.verdicts.contents()
        return sum(
            cut.states is not None and seen.get(cut.position) == cut.states
            for cut in self.plan.cuts
        )


def digest_of(judge: JudgePlan) -> str:
    """Return 16 hex digits that stand for what a judge looks for."""
    return hashlib.sha256(repr(judge).encode(errors="surrogateescape")).hexdigest()[:16]


def exit_code(tally: Tally) -> int:
    """Return 1 if any state failed, 2 if none did and not all could be judged, else 0."""
    if tally.verdicts[Verdict.FAIL]:
        return 1
    return 2 if tally.verdicts[Verdict.UNKNOWN] else 0


def lines(report: ExplorationReport, run: str, again: str, base: str) -> Iterator[str]:
    """Yield the report for people.

    `again` are the options that ask the same of another command: what is checked, and with what.
    `base` is the option that names the image, if it has to be named, for one that opens a state.
    """
    plan, tally = report.plan, report.tally
    yield from _what_was_explored(report)
    yield ""
    yield (
        f"verdicts: {tally.verdicts[Verdict.PASS]:,} pass, {tally.verdicts[Verdict.FAIL]:,} fail, "
        f"{tally.verdicts[Verdict.UNKNOWN]:,} unknown"
    )
    failed = list(report.verdicts.telling(SHOWN))
    for row in failed:
        yield f"  fail     {row.state}{_why(row)}"
    more = tally.verdicts[Verdict.FAIL] - len(failed)
    if more:
        yield f"           and {more:,} more"
    unknown = list(report.verdicts.rows(verdict=Verdict.UNKNOWN, limit=SHOWN))
    for row in unknown:
        yield f"  unknown  {row.state}{_why(row)}"
    more_unknown = tally.verdicts[Verdict.UNKNOWN] - len(unknown)
    if more_unknown:
        yield f"           and {more_unknown:,} more"
    if more or more_unknown:
        yield "           --json lists 100, the file of --db has all"
    if failed:
        yield from _never_sent(report.verdicts.fullest())
    yield from _doubts(report)
    if failed:
        yield ""
        opened = f"--state {failed[0].state}{base}"
        yield f"look at it:     nbdproxy open {run} {opened} -o state.img"
        yield f"make it small:  nbdproxy minimize {run} --state {failed[0].state} {again}"
    if report.complete < len(plan.cuts):
        yield ""
        yield "not visited: " + "; ".join(_left_out(plan))


def _never_sent(fullest: Mapping[int, Verdict]) -> Iterator[str]:
    """Yield at how many cuts a state fails though nothing that was sent is missing."""
    bad = list(fullest.values()).count(Verdict.FAIL)
    known = bad + list(fullest.values()).count(Verdict.PASS)
    if bad:
        where = "It" if known == 1 else f"At {bad:,} of {known:,} cuts it"
        yield f"           {where} fails even with all that had been sent: no lost write is to"
        yield "           blame, or what is asked for had not been written yet."


def _doubts(report: ExplorationReport) -> Iterator[str]:
    """Yield what speaks against the check itself."""
    verdicts = report.tally.verdicts
    if not report.verdicts.looked():
        yield "           The check read nothing of any state, so this proves nothing: let it"
        yield "           look at the disk, by $uri or $image."
    elif verdicts[Verdict.FAIL] == report.tally.visited > 1:
        yield "           Every state failed: is the check itself right? It should pass at a good"
        yield "           cut."


def _what_was_explored(report: ExplorationReport) -> Iterator[str]:
    about, plan, tally = report.about, report.plan, report.tally
    cuts = len(plan.cuts)
    where = f"cut {about['at']}" if cuts == plan.cuts_possible == 1 else _cuts_text(cuts)
    yield f"{about['recording']}: {about['mode']} x {about['failure']}, {where}"
    if report.missing:
        yield f"  missing   {report.missing}"
    if plan.cuts_possible > cuts:
        yield f"  cuts      {cuts:,} of {plan.cuts_possible:,} instants change what may be left"
    largest = max(plan.cuts, key=lambda cut: cut.states_log10)
    total = _total(plan)
    hang = f"{largest.sectors:,} sectors hang" if largest.sectors != 1 else "1 sector hangs"
    states = "1 state" if total == "1" else f"{total} states"
    yield f"  the model {states}; at most {hang} on chance at one cut"
    stages = report.verdicts.count("stage")
    yield f"  visited   {tally.visited:,}: " + ", ".join(
        f"{stages[stage]:,} {stage.value}" for stage in Stage if stage in stages
    )
    if report.complete:
        yield f"  complete  all that the model has {_at_cuts(report.complete, cuts)}"
    yield (
        f"  checked   {tally.how[CHECKED]:,}; {tally.how[SAME_CONTENT]:,} were the same as another "
        f"state, {tally.how[SAME_READS]:,} wherever the check had looked"
    )
    beyond = [stage.value for stage in Stage if stage in BEYOND and stage in stages]
    if beyond:
        yield f"  beyond    the model does not allow the states of: {', '.join(beyond)}"


def _cuts_text(count: int) -> str:
    """Return a number of cuts in words."""
    return f"{count:,} cuts" if count != 1 else "1 cut"


def _at_cuts(some: int, all_cuts: int) -> str:
    if some == all_cuts:
        return "at this cut" if all_cuts == 1 else "at all cuts"
    return f"at {some:,} of {all_cuts:,} cuts"


def _total(plan: ExplorationPlan) -> str:
    if all(cut.states is not None for cut in plan.cuts):
        return f"{sum(cut.states or 0 for cut in plan.cuts):,}"
    return f"about {states_text(max(cut.states_log10 for cut in plan.cuts))}"


def _left_out(plan: ExplorationPlan) -> Iterator[str]:
    for stage, count in plan.left_out.items():
        yield f"{stage.value} without end" if count is None else f"{count:,} {stage.value}"


def _why(row: Row) -> str:
    counts = {name: n for name, n in row.judgement.counts.items() if name != "whole"}
    parts = [f"{n:,} {name}" for name, n in counts.items()]
    if row.judgement.reason:
        parts.append(row.judgement.reason)
    return f"  {', '.join(parts)}" if parts else ""


def to_json(report: ExplorationReport) -> dict[str, object]:
    """Return the report as `nbdproxy explore --json` prints it."""
    plan, tally = report.plan, report.tally
    return {
        **report.about,
        "missing": report.missing,
        "cuts": len(plan.cuts),
        "cuts_possible": plan.cuts_possible,
        "model": {
            "states_log10": max(cut.states_log10 for cut in plan.cuts),
            "states": None
            if any(cut.states is None for cut in plan.cuts)
            else sum(cut.states or 0 for cut in plan.cuts),
            "sectors": max(cut.sectors for cut in plan.cuts),
        },
        "visited": tally.visited,
        "stages": report.verdicts.count("stage"),
        "cuts_complete": report.complete,
        "looked": report.verdicts.looked(),
        "checked": tally.how[CHECKED],
        "same_content": tally.how[SAME_CONTENT],
        "same_reads": tally.how[SAME_READS],
        "not_visited": {stage.value: n for stage, n in plan.left_out.items()}
        if report.complete < len(plan.cuts)
        else {},
        "verdicts": {verdict.value: n for verdict, n in tally.verdicts.items()},
        "cuts_where_all_that_was_sent_fails": list(report.verdicts.fullest().values()).count(
            Verdict.FAIL
        ),
        "failing": [
            {
                "state": row.state,
                "stage": row.stage,
                "reason": row.judgement.reason,
                "counts": dict(row.judgement.counts),
            }
            for row in report.verdicts.telling(100)
        ],
        "unknown": [
            {"state": row.state, "reason": row.judgement.reason}
            for row in report.verdicts.rows(verdict=Verdict.UNKNOWN, limit=100)
        ],
    }

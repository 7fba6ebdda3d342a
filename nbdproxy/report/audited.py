"""What an audit found, for people and for programs: who kept what was promised."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nbdproxy.crash.audit import BEFORE, FAULTS, UNKNOWN, ZEROES, Audit, Fate, Finding
from nbdproxy.crash.blame import blame
from nbdproxy.crash.cells import NONE
from nbdproxy.crash.timeline import Timeline
from nbdproxy.oracles.owners import OwnerMap
from nbdproxy.persistence.model import Options
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording, command_name
from nbdproxy.sizes import size_text

SHOWN = 5
"""So many faults are listed; --json lists a thousand places of every fate but as-sent."""
LISTED = 1000
PATHS_SHOWN = 8
LOOKED_UP = 256
"""Of so many faults the owners are looked up."""


@dataclass(frozen=True, slots=True)
class Report:
    """One audit: of which store, against which recording, and what `owners` were hit.

    `owners` has the words for who lives in a fault, and how many faults it has.
    """

    run: str
    store: str
    recording: Recording
    timeline: Timeline
    options: Options
    audit: Audit
    owners: Counter[str]

    @property
    def faults(self) -> list[Finding]:
        """What no store may leave behind."""
        return [finding for finding in self.audit.findings if finding.fate in FAULTS]


def owners_of(timeline: Timeline, audit: Audit) -> Counter[str]:
    """Return who lives where a fault is, by the disk with all that was sent."""
    faults = [finding for finding in audit.findings if finding.fate in FAULTS]
    found: Counter[str] = Counter()
    if faults:
        owners = OwnerMap(timeline.at(timeline.source.events))
        for finding in faults[:LOOKED_UP]:
            for owner in owners.of(finding.extent):
                found[" of ".join([str(owner.kind), *owner.paths[:1]])] += 1
    return found


def lines(report: Report) -> Iterator[str]:
    """Yield the report for people."""
    audit = report.audit
    yield f"{report.store} against {report.run}: {size_text(audit.compared)} were sent to it"
    for fate in Fate:
        if audit.sizes[fate] or fate is Fate.AS_SENT:
            yield f"  {fate.value:<15} {size_text(audit.sizes[fate]):>10}   {_MEANING[fate]}"
    rest = report.timeline.source.size - audit.compared
    yield f"  {'never sent':<15} {size_text(rest):>10}   not compared"
    if report.recording.missing:
        yield f"missing: {report.recording.missing}"
    faults = report.faults
    for finding in faults[:SHOWN]:
        yield ""
        yield from _told(report, finding)
    if len(faults) > SHOWN:
        yield ""
        yield f"  and {len(faults) - SHOWN:,} more places; --json lists {LISTED:,}"
    if report.owners:
        yield ""
        yield "what lives there: " + "; ".join(
            f"{words} ({count:,})" for words, count in report.owners.most_common(PATHS_SHOWN)
        )
    yield ""
    yield from _verdict(report)


_MEANING = {
    Fate.AS_SENT: "what was sent last is there",
    Fate.UNFLUSHED: "what was sent last is not there, and no flush covered it: allowed",
    Fate.TRIMMED: "trimmed last: what it holds is up to the store",
    Fate.BROKEN: "flushed, answered, and not there",
    Fate.FOREIGN: "holds what was never sent there",
}


def _told(report: Report, finding: Finding) -> Iterator[str]:
    extent = finding.extent
    yield f"  bytes {extent.offset:,} to {extent.end - 1:,}: {finding.fate.value}"
    yield f"    should hold: {_promise(report, finding)}"
    yield f"    holds:       {_request(report, finding.holds)}"


def _promise(report: Report, finding: Finding) -> str:
    """Say what must be there, and why."""
    text = _request(report, finding.durable)
    if finding.durable == NONE:
        return f"{text}, or what was sent and not flushed"
    end = report.timeline.source.events
    why = blame(report.timeline, finding.durable, end, report.options)
    by = f"flush {why.flush}" if why.flush is not None else "its own FUA"
    return f"{text}, durable by {by}"


def _request(report: Report, row: int) -> str:
    """Say what a row is, or what else a place holds."""
    if row in _HELD:
        return _HELD[row]
    table = report.timeline.table
    seq = int(table.seq[row])
    at_s = report.timeline.source.time_of(seq) / 1e9
    what = f"a {command_name(int(table.command[row]))} of {int(table.length[row]):,} bytes"
    return f"request {seq}, {what}, received at {at_s:.6f} s"


_HELD = {
    BEFORE: "what was there before the recording",
    ZEROES: "zeroes that nobody wrote",
    UNKNOWN: "something that was never sent",
}


def _verdict(report: Report) -> Iterator[str]:
    """Say who is convicted and who is cleared."""
    sizes = report.audit.sizes
    below = f"below nbdproxy, in {report.recording.meta.image}"
    if sizes[Fate.BROKEN]:
        yield (
            f"A promise was broken {below}: it acknowledged flushes, and of what they covered "
            f"{size_text(sizes[Fate.BROKEN])} are not there. The guest and QEMU are cleared: "
            f"they had sent and flushed it."
        )
    if sizes[Fate.FOREIGN]:
        yield (
            f"{size_text(sizes[Fate.FOREIGN])} hold what was never sent: the store was written to "
            f"by somebody else since or meanwhile, or it damaged its data {below}."
        )
    if FAULTS & {fate for fate, size in sizes.items() if size}:
        yield from _own_faults(report)
    elif sizes[Fate.UNFLUSHED]:
        yield (
            "No promise was broken: what is not there had never been covered by a flush. Who "
            "should have flushed stands above nbdproxy: the guest, or QEMU's cache mode."
        )
    else:
        yield (
            "No promise was broken: all that was sent is there. What is missing all the same was "
            "never sent: look above nbdproxy, at the guest and at QEMU."
        )


def _own_faults(report: Report) -> Iterator[str]:
    """Say so if the nbdproxy that recorded made faults itself."""
    rules = Counter(
        json.loads(note.text).get("rule") or "the policy"
        for note in report.recording.notes
        if note.kind is NoteKind.FAULT
    )
    if rules:
        told = ", ".join(f"{rule} ({count:,})" for rule, count in rules.most_common(PATHS_SHOWN))
        yield f"But the nbdproxy that recorded this made faults on purpose, so look there: {told}."


def to_json(report: Report) -> dict[str, object]:
    """Return the report as `nbdproxy audit --json` prints it."""
    audit = report.audit
    return {
        "recording": report.run,
        "store": report.store,
        "below": report.recording.meta.image,
        "missing": report.recording.missing,
        "compared": audit.compared,
        "never_sent": report.timeline.source.size - audit.compared,
        "bytes": {fate.value: audit.sizes[fate] for fate in Fate},
        "broken": bool(audit.sizes[Fate.BROKEN]),
        "places": [_place(report, finding) for finding in audit.findings[:LISTED]],
        "places_left_out": max(0, len(audit.findings) - LISTED),
        "owners": dict(report.owners.most_common()),
    }


def _place(report: Report, finding: Finding) -> dict[str, object]:
    table = report.timeline.table
    known = finding.holds not in _HELD
    return {
        "offset": finding.extent.offset,
        "length": finding.extent.length,
        "fate": finding.fate.value,
        "durable": None if finding.durable == NONE else int(table.seq[finding.durable]),
        "should_hold": _promise(report, finding),
        "holds_request": int(table.seq[finding.holds]) if known else None,
        "holds": _request(report, finding.holds),
    }

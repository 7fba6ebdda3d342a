"""The report of an audit, as text and as JSON: who kept what was promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nbdproxy.crash.blame.audit import FAULTS, UNKNOWN, ZEROES, Audit, Fate, Finding
from nbdproxy.crash.blame.flushes import Safety, blame
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.nbd.uri import is_uri
from nbdproxy.oracles.locate import tree_by_fstab
from nbdproxy.oracles.owners import OwnerMap
from nbdproxy.persistence.model import Options
from nbdproxy.printable import printable
from nbdproxy.recording.index import BASE
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording, command_name
from nbdproxy.sizes import plural, size_text

SHOWN = 5
"""Faults that the text lists; --json lists up to `LISTED` places of every fate but as-sent."""
LISTED = 1000
PATHS_SHOWN = 8
MOSTLY = 2
"""If more than one byte in so many is foreign, the store may be the wrong one."""
LOOKED_UP = 256
"""Faults whose owners are looked up."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """One audit: of which store, against which recording, and what `owners` were hit.

    `owners` has the words for who lives in a fault, and how many faults it has.

    >>> with Case.open("run1") as case:
    ...     report = case.audit("disk.img")
    >>> report.code, report.changed_since
    (1, False)
    """

    recording: Recording
    store: str
    timeline: Timeline
    options: Options
    audit: Audit
    owners: Counter[str]
    changed_since: bool
    """Whether the store is the recording's image, and was changed after the recording ended."""

    @property
    def faults(self) -> list[Finding]:
        """What no store may leave behind."""
        return [finding for finding in self.audit.findings if finding.fate in FAULTS]

    @property
    def ended(self) -> bool:
        """Whether the recording goes to its end; else what came later may explain any fault."""
        return self.recording.ending is not None

    @property
    def own_policies(self) -> list[str]:
        """The policies that the nbdproxy had which recorded, but for what changes nothing."""
        named = list(self.recording.meta.policies)
        for note in self.recording.notes:
            if note.kind is NoteKind.POLICY:
                told = note.fields.get("policies")
                named += [str(name) for name in told] if isinstance(told, list) else []
        return [name for name in dict.fromkeys(named) if name != "passthrough"]

    @property
    def code(self) -> int:
        """The exit code: 1 for a fault, 2 if that cannot be told, as where nothing was recorded."""
        if self.is_empty:
            return 2
        if not self.faults:
            return 2 if self.recording.is_damaged else 0
        return 1 if self.ended else 2

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded that could be compared: no request, or only trims."""
        return not any(size for fate, size in self.audit.sizes.items() if fate is not Fate.TRIMMED)


def owners_of(timeline: Timeline, audit: Audit) -> Counter[str]:
    """Count the owners of the bytes with a fault, as the disk with all that was sent has them."""
    faults = [finding for finding in audit.findings if finding.fate in FAULTS]
    found: Counter[str] = Counter()
    if faults:
        disk = timeline.at(timeline.source.events)
        owners = OwnerMap(disk, tree_by_fstab(disk))
        for finding in faults[:LOOKED_UP]:
            for owner in owners.of(finding.extent):
                found[" of ".join([str(owner.kind), *owner.paths[:1]])] += 1
    return found


def lines(report: AuditReport) -> Iterator[str]:
    """Yield the report for people."""
    audit = report.audit
    touched = size_text(audit.compared)
    yield f"{report.store} against {report.recording.path}: requests touched {touched} of it"
    for fate in Fate:
        if audit.sizes[fate] or fate is Fate.AS_SENT:
            yield f"  {fate.value:<15} {size_text(audit.sizes[fate]):>10}   {_MEANING[fate]}"
    rest = report.timeline.source.size - audit.compared
    yield f"  {'never sent':<15} {size_text(rest):>10}   not compared"
    if report.recording.missing:
        yield f"note: {report.recording.missing}"
    faults = report.faults
    for finding in faults[:SHOWN]:
        yield ""
        yield from _told(report, finding)
    if len(faults) > SHOWN:
        yield ""
        yield f"  and {plural(len(faults) - SHOWN, 'more place')}; --json lists {LISTED:,}"
    if report.owners:
        yield ""
        yield "what lives there: " + "; ".join(
            f"{printable(words)} ({count:,})"
            for words, count in report.owners.most_common(PATHS_SHOWN)
        )
    yield ""
    yield from _verdict(report)


_MEANING = {
    Fate.AS_SENT: "what was sent last is there",
    Fate.UNFLUSHED: "what was sent last is not there, and no flush covered it: allowed",
    Fate.TRIMMED: "trimmed: what it holds is up to the store, and not compared",
    Fate.BROKEN: "flushed, answered, and not there",
    Fate.FOREIGN: "holds what it never may have held",
}


def _told(report: AuditReport, finding: Finding) -> Iterator[str]:
    extent = finding.extent
    yield f"  bytes {extent.offset:,} to {extent.end - 1:,}: {finding.fate.value}"
    yield f"    should hold: {_promise(report, finding)}"
    yield f"    holds:       {_held(report, finding)}"


def _promise(report: AuditReport, finding: Finding) -> str:
    """Say what must be there, and why."""
    text = _request(report, finding.durable)
    if finding.durable == BASE:
        return f"{text}, or what was sent and not flushed"
    end = report.timeline.source.events
    why = blame(report.timeline, finding.durable, end, report.options)
    by = f"flush {why.flush}" if why.flush is not None else "its own FUA"
    return f"{text}, durable by {by}"


def _held(report: AuditReport, finding: Finding) -> str:
    """Say what a place holds."""
    trimmed = finding.fate is Fate.TRIMMED
    return "whatever a TRIM left" if trimmed else _request(report, finding.holds)


def _request(report: AuditReport, row: int) -> str:
    """Name the request of a row, or say what else a place holds."""
    if row in _HELD:
        return _HELD[row]
    table = report.timeline.table
    seq = int(table.seq[row])
    at_s = report.timeline.source.time_of(seq) / 1e9
    what = f"a {command_name(int(table.command[row]))} of {int(table.length[row]):,} bytes"
    return f"request {seq}, {what}, received at {at_s:.6f} s"


_HELD = {
    BASE: "what was there before the recording",
    ZEROES: "zeroes that nobody wrote",
    UNKNOWN: "something that was never sent",
}


def _verdict(report: AuditReport) -> Iterator[str]:
    """Yield the sentences that say whether a promise was broken, and by whom."""
    sizes = report.audit.sizes
    if report.is_empty:
        what = "nothing that was written is in the recording"
        if sizes[Fate.TRIMMED]:
            what = "there are only trims, and what they leave is up to the store"
        yield f"It cannot be told whether a promise was broken: {what}."
        return
    recorded = report.recording.meta.image  # a server may be asked about by its own file
    below = f"below nbdproxy, in {recorded if is_uri(recorded) else report.store}"
    if report.faults and not report.ended:
        yield (
            "It cannot be told whether a promise was broken: the recording was cut off, and what "
            "came after its end may be what is there."
        )
        return
    if report.faults and report.changed_since:
        yield (
            f"{report.store} was changed after the recording ended: what follows holds only if "
            f"nobody wrote to it."
        )
    if report.faults and report.own_policies:
        yield from _own_faults(report)
    elif sizes[Fate.BROKEN]:
        broken = f"promise was broken {below}"
        start = f"If nobody else wrote to it since, a {broken}" if report.changed_since else None
        yield (
            f"{start or f'A {broken}'}: it acknowledged flushes, and of what they covered "
            f"{size_text(sizes[Fate.BROKEN])} are not there. The guest and QEMU are "
            f"{'then ' if start else ''}cleared: they had sent and flushed it."
        )
    if sizes[Fate.FOREIGN]:
        yield (
            f"{size_text(sizes[Fate.FOREIGN])} hold what they never may have: the store was "
            f"written to by somebody else since or meanwhile, or it damaged its data {below}."
        )
        if MOSTLY * sizes[Fate.FOREIGN] > report.audit.compared:
            yield f"That is most of what was written: is {report.store} what was recorded?"
    if not report.faults:
        yield from _cleared(report)


def _cleared(report: AuditReport) -> Iterator[str]:
    """Yield why nothing below nbdproxy is to blame."""
    if report.recording.is_damaged:
        yield (
            "No promise that can still be read was broken; whether one was of those that are lost "
            "with the end of the recording cannot be told."
        )
        return
    if not report.audit.sizes[Fate.UNFLUSHED]:
        yield (
            "No promise was broken: all that was sent is there. What is missing all the same was "
            "never sent: look above nbdproxy, at the guest and at QEMU."
        )
        return
    why = _why_allowed(report)
    told = ", ".join(f"{safety.value} ({count:,})" for safety, count in why.most_common())
    yield f"No promise was broken: what was sent last and is not there was not safe: {told}."
    if why[Safety.NEVER_FLUSHED]:
        yield ("Who should have flushed stands above nbdproxy: the guest, or QEMU's cache mode.")


def _why_allowed(report: AuditReport) -> Counter[Safety]:
    """Return why what was sent last might be lost, for the places where it was."""
    end = report.timeline.source.events
    sent = report.timeline.at(end)
    found: Counter[Safety] = Counter()
    for finding in report.audit.findings[:LISTED]:
        if finding.fate is Fate.UNFLUSHED:
            for _, _, row in sent.segments(finding.extent.offset, finding.extent.offset + 1):
                if row != BASE:
                    found[blame(report.timeline, row, end, report.options).safety] += 1
    # Two that were under way at once may land in either order, whatever was flushed.
    found[Safety.UNANSWERED] += found.pop(Safety.BROKEN, 0)
    return +found


def _own_faults(report: AuditReport) -> Iterator[str]:
    """Say that the nbdproxy that recorded had a policy of its own, and what that did."""
    yield (
        f"A promise was broken, and the nbdproxy that recorded this had a policy that may have "
        f"done it on purpose: {', '.join(report.own_policies)}. Look there first."
    )
    rules = Counter(
        str(note.fields.get("rule") or "the policy")
        for note in report.recording.notes
        if note.kind is NoteKind.FAULT
    )
    if rules:
        told = ", ".join(f"{rule} ({count:,})" for rule, count in rules.most_common(PATHS_SHOWN))
        yield f"Faults that it made: {told}."


def to_json(report: AuditReport) -> dict[str, object]:
    """Return the report as `nbdproxy audit --json` prints it."""
    audit = report.audit
    return {
        "recording": str(report.recording.path),
        "store": report.store,
        "below": report.recording.meta.image,
        "missing": report.recording.missing,
        "compared": audit.compared,
        "never_sent": report.timeline.source.size - audit.compared,
        "bytes": {fate.value: audit.sizes[fate] for fate in Fate},
        "broken": bool(audit.sizes[Fate.BROKEN]) if report.ended and not report.is_empty else None,
        "own_policies": report.own_policies,
        "changed_since": report.changed_since,
        "places": [_place(report, finding) for finding in audit.findings[:LISTED]],
        "places_left_out": max(0, len(audit.findings) - LISTED),
        "owners": dict(report.owners.most_common()),
    }


def _place(report: AuditReport, finding: Finding) -> dict[str, object]:
    table = report.timeline.table
    known = finding.holds not in _HELD and finding.fate is not Fate.TRIMMED
    return {
        "offset": finding.extent.offset,
        "length": finding.extent.length,
        "fate": finding.fate.value,
        "durable": None if finding.durable == BASE else int(table.seq[finding.durable]),
        "should_hold": _promise(report, finding),
        "holds_request": int(table.seq[finding.holds]) if known else None,
        "holds": _held(report, finding),
    }

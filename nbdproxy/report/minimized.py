"""The fewest writes that a failing state lacks, in words: request, place, owner, flush."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbdproxy.crash.blame.flushes import Blame, blame
from nbdproxy.crash.explore.minimize import Lost, Minimum
from nbdproxy.crash.states.naming import Choice
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.extents import Extent
from nbdproxy.oracles.locate import tree_by_fstab
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.owners import Owner, OwnerMap
from nbdproxy.printable import printable
from nbdproxy.recording.index import BASE, NEVER
from nbdproxy.recording.reader import command_name
from nbdproxy.sizes import plural

OWNERS_MAX = 8
"""Owners of one missing piece that the text lists."""


@dataclass(frozen=True, slots=True)
class Missing:
    """One missing piece of a request.

    `seq` is None where no request is missing, but one shows that should not: another order.
    Instants are nanoseconds since the recording began; `completed_ns` is None without a reply.
    """

    extent: Extent
    sectors: int
    seq: int | None
    command: str
    request: Extent
    received_ns: int
    completed_ns: int | None
    owners: tuple[Owner, ...]
    blame: Blame | None


@dataclass(frozen=True, slots=True)
class MinimumReport:
    """A minimum, and all that can be said of what is missing in it.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     found = case.explore(ExploreRequest(states=20, workers=1))
    ...     report = case.minimize(found.failing()[0])
    >>> report.missing[0].blame.safety.value
    'never-flushed'
    """

    minimum: Minimum
    missing: tuple[Missing, ...]


def tell(timeline: Timeline, minimum: Minimum, tree: Tree | None = None) -> MinimumReport:
    """Describe each missing piece; the owners are those of the disk that lacks nothing.

    `tree` says where in the guest they show, if that is known; else its fstab is looked for.
    """
    state = minimum.state
    full = replace(state, choice=Choice.ALL, parts=(), seed=0, number=0, pins=())
    if not minimum.lost:
        return MinimumReport(minimum, ())
    disk = timeline.open(full)
    owners = OwnerMap(disk, tree or tree_by_fstab(disk))
    missing = (_missing(timeline, minimum, lost, owners) for lost in minimum.lost)
    return MinimumReport(minimum, tuple(missing))


def _missing(timeline: Timeline, minimum: Minimum, lost: Lost, owners: OwnerMap) -> Missing:
    state, table, source = minimum.state, timeline.table, timeline.source
    size = state.options.sector
    start, end = lost.first * size, min((lost.last + 1) * size, source.size)
    if lost.row != BASE:  # it may begin or end inside its sectors
        request = table.extent(lost.row)
        start, end = max(start, request.offset), min(end, request.end)
    extent = Extent.between(start, end)
    found = tuple(owners.of(extent))
    sectors = lost.last - lost.first + 1
    if lost.row == BASE:
        return Missing(extent, sectors, None, "", extent, 0, None, found, None)
    row = lost.row
    seq, done = int(table.seq[row]), int(table.completed[row])
    return Missing(
        extent,
        sectors,
        seq,
        command_name(int(table.command[row])),
        table.extent(row),
        source.time_of(seq),
        None if done == NEVER else source.time_of(done),
        found,
        blame(timeline, row, state.position, state.options),
    )


def lines(told: MinimumReport, run: str, base: str) -> Iterator[str]:
    """Yield the report as text; `base` is the option that names the image to `open`, if needed."""
    minimum = told.minimum
    judged = minimum.judged.judgement
    counts = [f"{n:,} {name}" for name, n in judged.counts.items() if name != "whole"]
    said = ", ".join([*counts, *([judged.reason] if judged.reason else [])])
    yield f"{minimum.state}{f': {said}' if said else ''}"
    if not told.missing:
        yield "it fails although all that had been sent is there: no lost write is to blame"
    else:
        requests = len({missing.seq for missing in told.missing})
        what = "this is" if requests == 1 else f"parts of these {requests:,} requests are"
        yield f"it fails as soon as {what} missing:"
    for missing in told.missing:
        yield ""
        yield from _lines(missing)
    yield ""
    opened = f"nbdproxy open {run} --state {minimum.state}{base}"
    yield f"after {plural(minimum.checks, 'check')}; look at it: {opened}"


def _lines(missing: Missing) -> Iterator[str]:
    where = f"bytes {missing.extent.offset:,} to {missing.extent.end - 1:,} of the disk"
    if missing.seq is None:
        yield f"  {where} show a request that did not land last"
    else:
        all_of_it = missing.extent == missing.request
        what = f"{missing.command} of {missing.request.length:,} bytes"
        yield f"  request {missing.seq}, a {what}, received at {missing.received_ns / 1e9:.6f} s"
        part = "all of it" if all_of_it else f"{missing.sectors:,} of its sectors"
        yield f"    missing: {part}, {where}"
    for owner in missing.owners[:OWNERS_MAX]:
        yield f"    there:   {printable(owner.words())}"
    if len(missing.owners) > OWNERS_MAX:
        yield f"             and {len(missing.owners) - OWNERS_MAX:,} more"
    if missing.blame is not None:
        yield f"    why:     {missing.blame.sentence()}"


def to_json(told: MinimumReport, run: str) -> dict[str, object]:
    """Return the report as `nbdproxy minimize --json` prints it."""
    minimum = told.minimum
    return {
        "recording": run,
        "state": str(minimum.state),
        "verdict": minimum.judged.judgement.verdict.value,
        "reason": minimum.judged.judgement.reason,
        "counts": dict(minimum.judged.judgement.counts),
        "checks": minimum.checks,
        "missing": [
            {
                "request": missing.seq,
                "command": missing.command,
                "offset": missing.extent.offset,
                "length": missing.extent.length,
                "request_offset": missing.request.offset,
                "request_length": missing.request.length,
                "received_s": missing.received_ns / 1e9,
                "completed_s": missing.completed_ns and missing.completed_ns / 1e9,
                "owners": [
                    {"kind": str(o.kind), "paths": list(o.paths), "words": o.words()}
                    for o in missing.owners
                ],
                "safety": missing.blame and missing.blame.safety.value,
                "flush": missing.blame and missing.blame.flush,
                "why": missing.blame and missing.blame.sentence(),
            }
            for missing in told.missing
        ],
    }

"""Histories of files, in words: when each was sent and safe, what carried it, who lost it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nbdproxy.crash.blame.causes import CAUSES, Cause
from nbdproxy.crash.blame.explain import FileExplanation
from nbdproxy.crash.blame.file_history import LEVELS, CarryingRequest, FileHistory, LevelHistory
from nbdproxy.crash.blame.replay import Cell, Replay
from nbdproxy.crash.states.cuts import Cut
from nbdproxy.crash.states.source import Source
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.mounts import Mount
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode, Failure, Taken, guarantee
from nbdproxy.printable import printable
from nbdproxy.report import lost
from nbdproxy.sizes import plural

REQUESTS_SHOWN = 6
"""Requests that the text lists; --json has all."""
INSTANTS_SHOWN = 12
"""Instants that the text of an overview lists, evenly spread; --json has all."""

_CALLED = {
    Level.RECEIVED: "sent",
    Level.COMPLETED: "answered",
    Level.FLUSHED: "flushed",
}


def lines(told: FileExplanation, source: Source) -> Iterator[str]:
    """Yield a history for people, about one screen."""
    history = told.history
    size = f", {history.entry.size:,} bytes" if history.entry.size is not None else ""
    yield f"{printable(history.entry.path)}{size}{_place(told)}"
    yield ""
    if (created := history.levels[Level.RECEIVED].created) is not None:
        yield f"  created   {_at(created, source)}"
    for level in LEVELS:
        yield f"  {_CALLED[level]:<10}{_whole_when(history.levels[level], source)}"
    yield ""
    yield from _carried(told.requests)
    yield from _protection(history, source, told.replay)
    yield ""
    yield from _verdict(told, source)


def _place(told: FileExplanation) -> str:
    """Say which filesystem the file is on, if there are several."""
    tree = told.replay.tree
    mount = tree.of(told.history.entry.path)
    if isinstance(mount, str):
        return f"; {mount}"
    return f", on {mount.words}" if len(tree.mounts) > 1 else ""


def _whole_when(level: LevelHistory, source: Source) -> str:
    first, since = level.first, level.since
    if first is None:
        seen = [change for change in level.changes if change.condition is not Condition.MISSING]
        if not seen:
            return "never"
        if any(change.condition is Condition.CANNOT_BE_TOLD for change in seen):
            return "cannot be told"
        last = seen[-1]
        return f"never whole; {last.condition.value} from {_at(last.position, source)} on"
    if since is None:
        last = level.changes[-1]
        return (
            f"whole first at {_at(first, source)}, and {last.condition.value} "
            f"from {_at(last.position, source)} on"
        )
    text = f"whole from {_at(since, source)} on"
    return text if first == since else f"{text} (first at {_at(first, source)})"


def _at(position: int, source: Source) -> str:
    if not position:
        return "the start"
    return f"{source.time_of(position - 1) / 1e9:.3f} s (seq {position - 1})"


def _carried(requests: Sequence[CarryingRequest]) -> Iterator[str]:
    """Yield the requests that hold the file in the end."""
    for number, one in enumerate(requests[:REQUESTS_SHOWN]):
        head = "  carried by" if not number else "            "
        yield (
            f"{head} request {one.seq} at {one.received_ns / 1e9:.3f} s, "
            f"{one.request.length:,} bytes: {'; '.join(_kinds(one))}"
        )
        yield f"               {one.blame.in_the_end()}"
    if len(requests) > REQUESTS_SHOWN:
        yield f"             and {len(requests) - REQUESTS_SHOWN:,} more; --json lists them"
    if requests:
        yield ""


def _kinds(one: CarryingRequest) -> list[str]:
    return list(dict.fromkeys(str(owner.kind) for owner in one.owners))


def protected_since(history: FileHistory, mode: CacheMode) -> int | None:
    """Return from which position on host power loss leaves the file whole under a mode."""
    level = guarantee(mode, Failure.HOST_POWER_LOSS)
    if level in history.levels:
        return history.levels[level].since
    # Nothing that was sent is kept: only what nobody touched is safe.
    untouched = all(len(level.changes) == 1 for level in history.levels.values())
    return 0 if untouched and history.levels[Level.RECEIVED].since == 0 else None


def _is_doubtful(history: FileHistory, mode: CacheMode) -> bool:
    """Tell whether it is unknown if host power loss leaves the file whole in the end."""
    level = guarantee(mode, Failure.HOST_POWER_LOSS)
    if level in history.levels:
        return history.levels[level].changes[-1].condition is Condition.CANNOT_BE_TOLD
    levels = history.levels.values()
    return all(c.changes[-1].condition is Condition.CANNOT_BE_TOLD for c in levels)


def _protection(history: FileHistory, source: Source, replay: Replay) -> Iterator[str]:
    """Say from when on each mode protects it, and how long it was at risk until then."""
    sent = history.levels[Level.RECEIVED].since
    alike: dict[tuple[int | None, bool], list[str]] = {}
    for mode in CacheMode:
        if mode not in replay.left_out:
            told = protected_since(history, mode), _is_doubtful(history, mode)
            alike.setdefault(told, []).append(mode.value)
    head = "  protected"
    for (since, doubtful), modes in alike.items():
        text = "cannot be told" if doubtful else "never"
        if since is not None:
            text = f"from {_at(since, source)} on"
            if sent is not None and since > sent:
                risk_ns = source.time_of(since - 1) - (source.time_of(sent - 1) if sent else 0)
                text += f", at risk for {risk_ns / 1e9:.3f} s after it was sent"
        yield f"{head:<12}{', '.join(modes)}: {text}"
        head = ""


def _verdict(told: FileExplanation, source: Source) -> Iterator[str]:
    """Say what the cut leaves of it under each mode, who lost it, and what helps."""
    path = told.history.entry.path
    advice: dict[Cause, Cut] = {}
    for failure in dict.fromkeys(cell.failure for cell in told.replay.cells):
        cells = [cell for cell in told.replay.cells if cell.failure is failure]
        cut = cells[0].cut
        yield f"  {failure.value} at {cut.text}, {cut.time_ns(source) / 1e9:.3f} s:"
        alike: dict[str, list[str]] = {}
        for cell in cells:
            alike.setdefault(_fate(cell, path), []).append(cell.mode.value)
            outcome = cell.worst.files.get(path)
            if outcome is not None and outcome.cause is not None:
                latest = advice.setdefault(outcome.cause, cell.cut)
                advice[outcome.cause] = max(latest, cell.cut, key=lambda one: one.position)
        for fate, modes in alike.items():
            yield f"    {', '.join(modes)}: {fate}"
    if told.losses:
        yield ""
        yield from lost.lines(next(iter(told.losses.values())))
    for cause, cut in advice.items():
        yield ""
        yield f"  {cause.value}: {_advice(cause, cut, told.history, source)}"


def _advice(cause: Cause, cut: Cut, history: FileHistory, source: Source) -> str:
    """Say what a cause means for this file, and what would have prevented the loss."""
    sent = history.levels[Level.RECEIVED].first
    if cause is Cause.NEVER_SENT and sent is not None and sent > cut.position:
        later_ms = (source.time_of(sent - 1) - cut.time_ns(source)) / 1e6
        return (
            f"It was not yet sent at this cut; it was sent {later_ms:,.3f} ms later. An fsync that "
            f"had returned before would have had it sent and flushed."
        )
    return CAUSES[cause].advice


def _fate(cell: Cell, path: str) -> str:
    outcome = cell.worst.files.get(path)
    if outcome is None:
        return f"unknown ({cell.worst.reason})"
    text = outcome.condition.value
    if outcome.cause is not None:
        text += f", {outcome.cause.value}"
    best = cell.best.files.get(path)
    if best is not None and best.condition is not outcome.condition:
        text += f"; at best {best.condition.value}"
    return text


def overview(histories: Sequence[FileHistory]) -> list[tuple[int, dict[Level, int]]]:
    """Return how many files each level keeps whole, from each position on at which that changes."""
    moments = sorted({c.position for s in histories for k in LEVELS for c in s.levels[k].changes})
    deltas: dict[int, dict[Level, int]] = {position: {} for position in moments}
    for history in histories:
        for level in LEVELS:
            was = 0
            for change in history.levels[level].changes:
                now = int(change.condition is Condition.WHOLE)
                found = deltas[change.position]
                found[level] = found.get(level, 0) + now - was
                was = now
    counts = dict.fromkeys(LEVELS, 0)
    told = []
    for position in moments:
        counts = {level: counts[level] + deltas[position].get(level, 0) for level in LEVELS}
        told.append((position, counts))
    return told


def overview_lines(histories: Sequence[FileHistory], source: Source, taken: Taken) -> Iterator[str]:
    """Yield since when all files are safe; `taken` says of which modes that can be told."""
    rows = overview(histories)
    yield f"of {plural(len(histories), 'file')}, so many are whole in what was"
    yield f"  {'from':<24}{'sent':>10}{'answered':>10}{'flushed':>10}"
    steps = range(len(rows))
    if len(rows) > INSTANTS_SHOWN:
        steps = range(0, len(rows), -(-len(rows) // INSTANTS_SHOWN))
    for index in dict.fromkeys((*steps, len(rows) - 1)):
        position, counts = rows[index]
        numbers = "".join(f"{counts[level]:>10,}" for level in LEVELS)
        yield f"  {_at(position, source):<24}{numbers}"
    yield ""
    yield "What was answered, writethrough and directsync keep when the host loses power; what was"
    yield "flushed, none and writeback keep as well; unsafe keeps nothing for certain."
    for level, modes in (
        (Level.FLUSHED, (CacheMode.NONE, CacheMode.WRITEBACK)),
        (Level.COMPLETED, (CacheMode.WRITETHROUGH, CacheMode.DIRECTSYNC)),
    ):
        names = " and ".join(mode.value for mode in modes)
        if not set(modes) & set(taken.tells):
            yield f"Of {names} nothing can be told: {taken.why}."
            continue
        since = [history.levels[level].since for history in histories]
        safe = [position for position in since if position is not None]
        if len(safe) == len(histories):
            yield f"Under {names} everything is safe from {_at(max(safe), source)} on."
        else:
            yield f"Under {names} {plural(len(histories) - len(safe), 'file')} never became safe."
    if taken.remark:
        yield f"Note: {taken.remark}."


def overview_json(histories: Sequence[FileHistory], source: Source) -> dict[str, object]:
    """Return how many files were whole since when, as `nbdproxy explain --files --json` has it."""
    return {
        "files": len(histories),
        "instants": [
            {**(_instant(position, source) or {}), **{_CALLED[k]: counts[k] for k in LEVELS}}
            for position, counts in overview(histories)
        ],
    }


def to_json(told: FileExplanation, source: Source) -> dict[str, object]:
    """Return a history as `nbdproxy explain --json` prints it."""
    history = told.history
    mount = told.replay.tree.of(history.entry.path)
    return {
        "path": history.entry.path,
        "size": history.entry.size,
        "partition": mount.partition if isinstance(mount, Mount) else None,
        "created": _instant(history.levels[Level.RECEIVED].created, source),
        "levels": {
            _CALLED[level]: {
                "whole_first": _instant(history.levels[level].first, source),
                "whole_since": _instant(history.levels[level].since, source),
                "changes": [
                    {"condition": c.condition.value, **(_instant(c.position, source) or {})}
                    for c in history.levels[level].changes
                ],
            }
            for level in LEVELS
        },
        "protected_since": {
            mode.value: _instant(protected_since(history, mode), source)
            for mode in CacheMode
            if mode not in told.replay.left_out
        },
        "carried_by": [
            {
                "request": one.seq,
                "received_s": one.received_ns / 1e9,
                "offset": one.request.offset,
                "length": one.request.length,
                "what": [owner.words() for owner in one.owners],
                "flush": one.blame.flush,
                "safety": one.blame.safety.value,
            }
            for one in told.requests
        ],
        "cells": [
            {
                "mode": cell.mode.value,
                "failure": cell.failure.value,
                "state": str(cell.worst.state),
                "fate": _fate(cell, history.entry.path),
            }
            for cell in told.replay.cells
        ],
        "lost": {state: lost.to_json(losses) for state, losses in told.losses.items()},
    }


def _instant(position: int | None, source: Source) -> dict[str, object] | None:
    if position is None:
        return None
    return {"position": position, "time_s": source.time_of(position - 1) / 1e9 if position else 0.0}

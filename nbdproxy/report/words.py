"""The verdict in two plain sentences: whose fault, and which mode would have saved how many.

Both are about host power loss, the failure in which the cache modes differ most.
"""

from __future__ import annotations

from nbdproxy.crash.causes import Cause
from nbdproxy.crash.replay import Cell, Replay
from nbdproxy.oracles.condition import Condition
from nbdproxy.persistence.modes import CacheMode, Failure

_BLAME = {
    Cause.NEVER_SENT: "the guest had not sent to any disk when it was cut off",
    Cause.SENT_UNANSWERED: "were still on their way to the disk",
    Cause.UNFLUSHED: "had been written, but nobody had asked to flush them",
    Cause.FLUSH_IN_FLIGHT: "were being flushed at that very moment",
    Cause.FLUSHED_THEN_LOST: "had been flushed, and were lost below all the same",
}
_GUILTY = {
    Cause.NEVER_SENT: "the guest's own page cache lost them (no fsync), "
    "and no cache mode could have saved them",
    Cause.SENT_UNANSWERED: "nobody had promised to keep them",
    Cause.UNFLUSHED: "a volatile write cache lost them, for want of a flush",
    Cause.FLUSH_IN_FLIGHT: "the flush came too late",
    Cause.FLUSHED_THEN_LOST: "the mode or the store broke the promise of a flush",
}


def sentences(result: Replay) -> list[str]:
    """Return the two sentences; none if the table has no column for host power loss."""
    cells = {c.mode: c for c in result.cells if c.failure is Failure.HOST_POWER_LOSS}
    if not cells:
        return []
    shown = cells.get(CacheMode.NONE) or next(iter(cells.values()))
    return [_fault(shown), _saved(cells)]


def _fault(cell: Cell) -> str:
    total, whole = len(cell.worst.files), cell.worst.conditions[Condition.WHOLE]
    if not total:
        return f"Whose fault: that cannot be told, because {cell.worst.reason}."
    if whole == total:
        return (
            f"Whose fault: nobody's; all {total:,} files are whole under cache={cell.mode.value}."
        )
    causes = cell.worst.causes.most_common()
    if not causes:
        return f"Whose fault: {total - whole:,} of {total:,} files cannot be read."
    main, lost = causes[0]
    text = f"Whose fault: {lost:,} of {total:,} files {_BLAME[main]}: {_GUILTY[main]}"
    for cause, count in causes[1:]:
        text += f"; {count:,} more {_BLAME[cause]}"
    return text + "."


def _saved(cells: dict[CacheMode, Cell]) -> str:
    by_count: dict[int, list[str]] = {}
    for mode, cell in cells.items():
        by_count.setdefault(cell.worst.conditions[Condition.WHOLE], []).append(mode.value)
    total = max(len(cell.worst.files) for cell in cells.values())
    most, *rest = sorted(by_count.items(), reverse=True)
    text = f"{_modes(most[1])} would have saved {most[0]:,} of {total:,} files"
    for count, modes in rest:
        text += f", {_modes(modes)} {count:,}"
    return f"Had the host lost power then, {text}."


def _modes(names: list[str]) -> str:
    return f"cache mode{'s' if len(names) > 1 else ''} {_and(names)}"


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]

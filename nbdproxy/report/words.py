"""The verdict in two plain sentences: whose fault, and which mode would have saved how many.

Both are about host power loss, the failure in which the cache modes differ most.
"""

from __future__ import annotations

from nbdproxy.crash.causes import Cause
from nbdproxy.crash.replay import Cell, Replay
from nbdproxy.oracles.condition import Condition
from nbdproxy.persistence.modes import CacheMode, Failure

_BLAME = {
    Cause.NEVER_SENT: "were lost in the guest, which had not sent them to any disk (no fsync): "
    "no cache mode could have saved them",
    Cause.MAPPING_NEVER_SENT: "had been written, and the qcow2 table that leads to them was still "
    "in QEMU's memory (no flush had come): it dies with QEMU, and they read as zeroes",
    Cause.CANNOT_BE_TOLD: "were lost by someone who cannot be told: what would show it cannot be "
    "judged here",
    Cause.CHANGED_BY_GUEST: "were changed or removed by the guest itself: nobody lost them",
    Cause.SENT_UNANSWERED: "were still on their way to the disk, and nobody had promised anything",
    Cause.UNFLUSHED: "had been written and not flushed: a volatile write cache may lose them",
    Cause.FLUSH_IN_FLIGHT: "were being flushed at that very moment: the flush came too late",
    Cause.FLUSHED_THEN_LOST: "were lost although they were durable: "
    "the cache mode, or the store below, broke its promise",
}


def sentences(result: Replay) -> list[str]:
    """Return the two sentences; none if the table has no row for host power loss."""
    cells = {c.mode: c for c in result.cells if c.failure is Failure.HOST_POWER_LOSS}
    if not cells:
        return []
    if never_seen(result):
        return [
            "Whose fault: that cannot be told, because none of the files was ever seen on this "
            "disk; either the guest never sent them, or --root, the manifest or the disk is wrong."
        ]
    shown = cells.get(CacheMode.NONE) or next(iter(cells.values()))
    return [_fault(shown), _saved(cells)]


def never_seen(result: Replay) -> bool:
    """Tell whether even the fullest states have none of the files."""
    missing = {Condition.MISSING}
    return all(
        cell.best.conditions.keys() - {Condition.CANNOT_BE_TOLD} == missing
        and Cause.CHANGED_BY_GUEST not in cell.best.causes
        for cell in result.cells
    )


def _fault(cell: Cell) -> str:
    total, whole = len(cell.worst.files), cell.worst.conditions[Condition.WHOLE]
    if not total:
        return f"Whose fault: that cannot be told, because {cell.worst.reason}."
    if whole == total:
        return (
            f"Whose fault: nobody's; all {total:,} files are whole under cache={cell.mode.value}."
        )
    causes = cell.worst.causes.most_common()
    unknown = cell.worst.conditions[Condition.CANNOT_BE_TOLD]
    if not causes:
        return (
            f"Whose fault: as far as can be told nobody's; what became of {unknown:,} of "
            f"{total:,} files cannot be told."
        )
    main, lost = causes[0]
    text = f"Whose fault: {lost:,} of {total:,} files {_BLAME[main]}"
    for cause, count in causes[1:]:
        text += f"; {count:,} more {_BLAME[cause]}"
    if unknown:
        text += f"; what became of {unknown:,} more cannot be told"
    return text + "."


def _saved(cells: dict[CacheMode, Cell]) -> str:
    by_count: dict[tuple[int, int], list[str]] = {}
    for mode, cell in cells.items():
        ends = tuple(end.conditions[Condition.WHOLE] for end in (cell.worst, cell.best))
        by_count.setdefault((ends[0], ends[1]), []).append(mode.value)
    total = max(len(cell.worst.files) for cell in cells.values())
    parts = []
    for (worst, best), modes in sorted(by_count.items(), reverse=True):
        perhaps = f" (at best {best:,})" if best > worst else ""
        parts.append(f"{_and(modes)} {worst:,}{perhaps}")
    return (
        f"Had the host lost power then, these cache modes would certainly have saved, "
        f"of {total:,} files: {'; '.join(parts)}."
    )


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]

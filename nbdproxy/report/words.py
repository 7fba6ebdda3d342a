"""The verdict in two plain sentences: whose fault, and which mode would have saved how many.

Both are about host power loss, the failure in which the cache modes differ most.
"""

from __future__ import annotations

from nbdproxy.crash.blame.causes import CAUSES, Cause
from nbdproxy.crash.blame.replay import Cell, Replay
from nbdproxy.oracles.condition import Condition
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.sizes import plural

_NO_TRACE = {Condition.MISSING, Condition.DAMAGED, Condition.STALE}


def sentences(result: Replay) -> list[str]:
    """Return the two sentences; none if the table has no row for host power loss."""
    cells = {c.mode: c for c in result.cells if c.failure is Failure.HOST_POWER_LOSS}
    if not cells:
        return []
    if never_seen(result):
        return [
            "Whose fault: that cannot be told, because none of the files was ever seen on this "
            "disk as the manifest has it; either the guest never sent them, or --root, the "
            "manifest or the disk is wrong."
        ]
    shown = cells.get(CacheMode.NONE) or next(iter(cells.values()))
    return [_fault(shown), _saved(cells)]


def never_seen(result: Replay) -> bool:
    """Tell whether even the fullest states have no trace of what the manifest says.

    A file of another content is no trace of it: it may be of another version, or another digest.
    """
    return all(
        (traces := cell.best.conditions.keys() - {Condition.CANNOT_BE_TOLD})
        and traces <= _NO_TRACE
        and Cause.CHANGED_BY_GUEST not in cell.best.causes
        for cell in result.cells
    )


def _fault(cell: Cell) -> str:
    total, whole = len(cell.worst.files), cell.worst.conditions[Condition.WHOLE]
    if not total:
        return f"Whose fault: that cannot be told, because {cell.worst.reason}."
    if whole == total:
        all_of_it = "the file is" if total == 1 else f"all {total:,} files are"
        under = f"After a host power loss under cache={cell.mode.value}"
        if cell.best.conditions[Condition.WHOLE] == total:
            return f"{under} nobody lost anything: {all_of_it} whole."
        return f"{under} {all_of_it} whole as flushed; with what was sent later, {_later(cell)}."
    causes = cell.worst.causes.most_common()
    unknown = cell.worst.conditions[Condition.CANNOT_BE_TOLD]
    if not causes:
        return (
            f"Whose fault: as far as can be told nobody's; what became of {unknown:,} of "
            f"{plural(total, 'file')} cannot be told."
        )
    main, lost = causes[0]
    text = f"Whose fault: {lost:,} of {plural(total, 'file')} {_blame(main, lost)}"
    for cause, count in causes[1:]:
        text += f"; {count:,} more {_blame(cause, count)}"
    if unknown:
        text += f"; what became of {unknown:,} more cannot be told"
    return text + "."


def _later(cell: Cell) -> str:
    """Say what became of the files if all that was sent had come through."""
    total = len(cell.best.files)
    told = [
        f"{'it' if total == 1 else f'{count:,} of them'} {_blame(cause, count)}"
        for cause, count in cell.best.causes.most_common()
    ]
    unknown = cell.best.conditions[Condition.CANNOT_BE_TOLD] if cell.best.files else None
    if unknown is None:
        return f"that cannot be told, because {cell.best.reason}"
    if unknown:
        told.append(f"what became of {unknown:,} cannot be told")
    return "; ".join(told) or "some are not"


def _blame(cause: Cause, count: int) -> str:
    """Say what became of so many files."""
    return CAUSES[cause].sentence.format(
        were="was" if count == 1 else "were",
        them="it" if count == 1 else "them",
        they="it would" if count == 1 else "they",
    )


def _saved(cells: dict[CacheMode, Cell]) -> str:
    by_count: dict[tuple[int, int], list[str]] = {}
    judged = {mode: c for mode, c in cells.items() if c.worst.files and c.best.files}
    unknown = [mode.value for mode in cells if mode not in judged]
    if not judged:
        return "Which cache mode would have saved how many cannot be told either."
    for mode, cell in judged.items():
        best = max(end.conditions[Condition.WHOLE] for end in (cell.worst, cell.best))
        by_count.setdefault((_certain(cell), best), []).append(mode.value)
    total = max(len(cell.worst.files) for cell in cells.values())
    parts = []
    for (worst, best), modes in sorted(by_count.items(), reverse=True):
        perhaps = f" (at best {best:,})" if best > worst else ""
        parts.append(f"{_and(modes)} {worst:,}{perhaps}")
    if unknown:
        parts.append(f"of {_and(unknown)} it cannot be told")
    return (
        f"Had the host lost power then, these cache modes would have saved, "
        f"of {plural(total, 'file')}: {'; '.join(parts)}."
    )


def _certain(cell: Cell) -> int:
    """Count the files that are whole in both ends of what a cell may leave."""
    return sum(
        one.condition is Condition.WHOLE and one.condition is cell.best.files[path].condition
        for path, one in cell.worst.files.items()
    )


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]

"""The table cache mode x failure as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from nbdproxy.crash.blame.replay import Cell, Replay, StateOutcome
from nbdproxy.crash.blame.together import Together
from nbdproxy.crash.states.source import Source
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition, doubt_of
from nbdproxy.oracles.manifest import WEAK
from nbdproxy.persistence.modes import CACHED, CacheMode, Failure
from nbdproxy.printable import printable
from nbdproxy.sizes import plural

_STYLE = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.UNKNOWN: "yellow"}


def render(result: Replay, source: Source) -> Table:
    """Return the table: a column for modes that fare alike, a row for each failure and its cut."""
    groups = _alike(result)
    table = Table(show_lines=True)
    table.add_column("failure, and when", no_wrap=True)
    for modes in groups:
        table.add_column("\n".join(modes), overflow="fold")
    for index, failure in enumerate(dict.fromkeys(cell.failure for cell in result.cells)):
        cut = next(cell.cut for cell in result.cells if cell.failure is failure)
        when = f"{printable(cut.text)}, {cut.time_ns(source) / 1e9:.1f} s"
        # Consoles take plain text for what it is: only what is made here has colours.
        cells = (Text.from_markup(column[index]) for column in groups.values())
        table.add_row(Text(f"{failure.value}\n{when}"), *cells)
    return table


def _alike(result: Replay) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the cells' texts by mode; modes whose cells are all the same go together."""
    by_mode: dict[str, tuple[str, ...]] = {}
    for cell in result.cells:
        by_mode[cell.mode.value] = (*by_mode.get(cell.mode.value, ()), _cell_text(cell))
    alike: dict[tuple[str, ...], list[str]] = {}
    for mode, column in by_mode.items():
        alike.setdefault(column, []).append(mode)
    return {tuple(modes): column for column, modes in alike.items()}


def lost_files(result: Replay) -> Iterator[tuple[str, ...]]:
    """Yield what is told of each file that is not whole in the worst state of a cell, by cell."""
    for cell in result.cells:
        files = cell.worst.files
        for path in sorted(path for path, one in files.items() if not one.is_whole):
            one = files[path]
            cause = one.cause.value if one.cause else "-"
            told = (cell.mode.value, cell.failure.value, one.condition.value, cause)
            yield *told, printable(path)


def doubt(result: Replay) -> str | None:
    """Return what there is against the manifest itself."""
    ends = (end for cell in result.cells for end in (cell.worst, cell.best))
    states = {id(end.files): end.condition_of for end in ends}  # many cells have the same
    return doubt_of(result.manifest, list(states.values()))


def footnotes(together: Together) -> list[str]:
    """Return what has to be said about the table, one line each."""
    result = together.table
    total = len(result.manifest.entries)
    notes = [
        f"{plural(total, 'file')}. Each cell: the worst state that the model allows, who lost the "
        "files, and the best state where it differs."
    ]
    kinds = Counter((entry.algorithm, entry.size == 0) for entry in result.manifest.entries)
    empty = sum(count for (_, is_empty), count in kinds.items() if is_empty)
    if empty > 10 and empty * 5 > total:
        notes.append(
            f"{empty:,} files of the manifest are empty: was it made when they were lost already?"
        )
    weak: Counter[str] = Counter()
    for (algorithm, _), count in kinds.items():
        weak[algorithm] += count if algorithm in WEAK else 0
    notes += [
        f"{plural(count, 'file')} compared by {algorithm}: that shows what was lost, and proves "
        f"nothing where somebody may have forged a file"
        for algorithm, count in weak.items()
        if count
    ]
    if (why := doubt(result)) is not None:
        notes.append(why)
    mounts = [
        mount.words if len(together.each) == 1 else f"{mount.words} of disk {number}"
        for number, one in enumerate(together.each, start=1)
        for mount in one.tree.mounts
    ]
    if len(mounts) > 1:
        notes.append(f"the files are on {', '.join(mounts)}")
    cuts = {cell.cut.text: cell.cut for cell in result.cells if _hangs_on_note(cell)}
    notes += [f"{cut.text}: {cut.note}" for cut in cuts.values() if cut.note]
    if result.below_qcow2:
        below = [str(n) for n, one in enumerate(together.each, start=1) if one.below_qcow2]
        of = "" if len(below) == len(together.each) else f"disk {', '.join(below)} was "
        notes.append(
            f"{of}recorded below qcow2: the table tells what the qcow2 file held; tables that QEMU "
            "had in its memory outlive a reset of the guest, and it writes them when it ends in "
            "order"
        )
    if result.left_out:
        left = ", ".join(mode.value for mode in result.left_out)
        notes.append(
            f"left out: {left}; {result.why}; if you know QEMU's cache mode then, --recorded-as "
            f"says it"
            if any(one.left_out and _can_be_any(one) for one in together.each)
            else f"left out: {left}; {result.why}"
        )
    if result.remark:
        notes.append(result.remark)
    return notes + _reasons(result)


def _can_be_any(one: Replay) -> bool:
    """Tell whether only the user can know under which mode a recording was taken."""
    return len(one.recorded_under) == len(CacheMode)


def _hangs_on_note(cell: Cell) -> bool:
    """Tell whether what is said of a cell's cut may change the cell.

    Which flushes were QEMU's own is nothing to failures that flushes are nothing to.
    """
    if cell.cut.text != "before-exit":
        return True
    by_flushes = {Failure.HOST_POWER_LOSS, Failure.STORAGE_LOSS}
    return cell.cut.matters and cell.mode in CACHED and cell.failure in by_flushes


def _reasons(result: Replay) -> list[str]:
    """Return why states are as they are, and of a blank disk in which states it is."""
    found: dict[str, dict[str, None]] = {}
    for cell in result.cells:
        for end in (cell.worst, cell.best):
            if end.reason:
                found.setdefault(end.reason, {})[str(end.state)] = None
    return [
        f"{reason} (in {', '.join(states)})" if reason.endswith("reads all zeroes") else reason
        for reason, states in sorted(found.items())
    ]


def counts(outcome: StateOutcome, total: int) -> list[str]:
    """Return one line for each condition of a state, whole files first."""
    found = outcome.conditions
    if not found:
        return ["cannot be told"]
    whole = found[Condition.WHOLE]
    lines = [f"all {total:,} whole" if whole == total else f"{whole:,} of {total:,} whole"]
    lines += [f"{n:,} {c.value}" for c, n in found.most_common() if c is not Condition.WHOLE]
    return lines


def _cell_text(cell: Cell) -> str:
    total = sum(cell.worst.conditions.values())
    lines = counts(cell.worst, total)
    style = _STYLE[cell.worst.verdict]
    lines[0] = f"[{style}]{lines[0]}[/{style}]"
    lines += [f"[dim]{n:,} {cause.value}[/dim]" for cause, n in cell.worst.causes.most_common()]
    if cell.best.conditions != cell.worst.conditions:
        best = counts(cell.best, sum(cell.best.conditions.values()))[0]
        lines.append(f"best: {best}")
    return "\n".join(lines)

"""The table cache mode x failure as text for a terminal."""

from __future__ import annotations

from rich.table import Table

from nbdproxy.crash.replay import Cell, Outcome, Replay
from nbdproxy.crash.source import Source
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition

_STYLE = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.UNKNOWN: "yellow"}


def render(result: Replay, source: Source) -> Table:
    """Return the table: a row for modes that fare alike, a column for each failure and its cut."""
    failures = list(dict.fromkeys(cell.failure for cell in result.cells))
    table = Table(show_lines=True, pad_edge=False)
    table.add_column("cache mode", no_wrap=True)
    for failure in failures:
        cut = next(cell.cut for cell in result.cells if cell.failure is failure)
        # Broken behind the first hyphen, so that the table fits 80 columns.
        name = failure.value.replace("-", "-\n", 1)
        when = f"{cut.text}\nat {cut.time_ns(source) / 1e9:.1f} s"
        table.add_column(f"{name}\n{when}", overflow="fold")
    for modes, row in _rows(result).items():
        table.add_row("\n".join(modes), *row)
    return table


def _rows(result: Replay) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the text of each row; modes whose rows are the same share one."""
    by_mode: dict[str, tuple[str, ...]] = {}
    for cell in result.cells:
        by_mode[cell.mode.value] = (*by_mode.get(cell.mode.value, ()), _cell_text(cell))
    alike: dict[tuple[str, ...], list[str]] = {}
    for mode, row in by_mode.items():
        alike.setdefault(row, []).append(mode)
    return {tuple(modes): row for row, modes in alike.items()}


def footnotes(result: Replay) -> list[str]:
    """Return what has to be said about the table, one line each."""
    notes = [
        f"{len(result.manifest.entries):,} files. Each cell: the worst state that the model allows"
        " after that failure, who lost the files, and the best state where it differs."
    ]
    cuts = {cell.cut.text: cell.cut for cell in result.cells}
    notes += [f"{cut.text}: {cut.note}" for cut in cuts.values() if cut.note]
    if result.left_out:
        left = ", ".join(mode.value for mode in result.left_out)
        notes.append(
            f"left out: {left}; this recording was taken with the guest's write cache off and has "
            "none of the guest's flushes; record again with cache=none or writeback to judge them"
        )
    reasons = {end.reason for c in result.cells for end in (c.worst, c.best) if end.reason}
    return notes + sorted(reasons)


def counts(outcome: Outcome, total: int) -> list[str]:
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

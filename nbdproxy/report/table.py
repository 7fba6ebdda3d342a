"""The table cache mode x failure as text for a terminal."""

from __future__ import annotations

from rich.table import Table

from nbdproxy.crash.replay import Cell, Outcome, Replay
from nbdproxy.crash.source import Source
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition

_STYLE = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.UNKNOWN: "yellow"}


def render(result: Replay, source: Source) -> Table:
    """Return the table: a row for each mode, a column for each failure and its cut."""
    modes = list(dict.fromkeys(cell.mode for cell in result.cells))
    failures = list(dict.fromkeys(cell.failure for cell in result.cells))
    cells = {(cell.mode, cell.failure): cell for cell in result.cells}
    table = Table(show_lines=True, pad_edge=False)
    table.add_column("cache mode", no_wrap=True)
    for failure in failures:
        cut = cells[modes[0], failure].cut
        table.add_column(f"{failure.value}\nat {cut.text} ({cut.time_ns(source) / 1e9:.1f} s)")
    for mode in modes:
        row = [_cell_text(cells[mode, failure]) for failure in failures]
        table.add_row(mode.value, *row)
    return table


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
    lines = [f"{found[Condition.WHOLE]:,} of {total:,} whole"]
    lines += [f"{n:,} {c.value}" for c, n in found.most_common() if c is not Condition.WHOLE]
    return lines


def _cell_text(cell: Cell) -> str:
    total = sum(cell.worst.conditions.values())
    lines = counts(cell.worst, total)
    style = _STYLE[cell.worst.verdict]
    lines[0] = f"[{style}]{lines[0]}[/{style}]"
    lines += [f"[dim]{cause.value}: {n:,}[/dim]" for cause, n in cell.worst.causes.most_common()]
    if cell.best.conditions != cell.worst.conditions:
        best = counts(cell.best, sum(cell.best.conditions.values()))[0]
        lines.append(f"best: {best}")
    return "\n".join(lines)

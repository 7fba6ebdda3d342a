"""Which cache mode would have saved the files of a recording, had the host lost power?

    python3 examples/compare_modes.py run1 files.sha256

Prints a line for each cache mode that the recording tells of. Exit code 0 if one would have saved
all files, else 1.
"""

from __future__ import annotations

import sys

import nbdproxy
from nbdproxy import Condition, Failure


def main(run: str, files: str) -> int:
    """Print how many files each mode leaves whole, at worst and at best."""
    with nbdproxy.Case.open(run, files=files) as case:
        table = case.replay(failures=[Failure.HOST_POWER_LOSS]).table
    total = len(table.manifest.entries)
    for cell in table.cells:
        worst, best = (end.conditions[Condition.WHOLE] for end in (cell.worst, cell.best))
        lost = ", ".join(f"{count} {cause.value}" for cause, count in cell.worst.causes.items())
        print(f"{cell.mode.value:<14}{worst} of {total} whole, at best {best}  {lost}".rstrip())
    return 0 if any(cell.worst.verdict is nbdproxy.Verdict.PASS for cell in table.cells) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""`--oracle`, and what is said where two of them differ; the exit codes of verdicts."""

from __future__ import annotations

from typing import Annotated

import typer

from nbdproxy.case.oracles import OracleName
from nbdproxy.checker.both import BothOracles
from nbdproxy.cli.console import err
from nbdproxy.oracles.check import Verdict
from nbdproxy.sizes import plural

OracleChoice = Annotated[
    OracleName,
    typer.Option(
        "--oracle",
        help="Who reads the files: nbdproxy itself (quick; ext2, ext3 and ext4); a guest with a "
        "real kernel (also XFS, Btrfs, FAT, exFAT, NTFS); or both, and where they differ.",
    ),
]

EXIT = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.UNKNOWN: 2}
"""The exit codes of commands that judge."""


def tell_differences(comparison: BothOracles | None) -> None:
    """Say on stderr where the two oracles differed, if both were asked."""
    if comparison is None:
        return
    for one in comparison.differences:
        err.print(
            f"they differ: in state {one.state} the kernel finds {one.path} "
            f"{one.kernel.value}, the quick oracle {one.quick.value}",
            markup=False,
        )
    err.print(
        f"both oracles judged {plural(comparison.compared, 'state')}: "
        f"{plural(len(comparison.differences), 'difference')}",
        markup=False,
    )


def differences_json(comparison: BothOracles | None) -> dict[str, object]:
    """Return the same for a command's JSON; nothing unless both were asked."""
    if comparison is None:
        return {}
    return {
        "compared": comparison.compared,
        "differences": [
            {
                "state": one.state,
                "path": one.path,
                "kernel": one.kernel.value,
                "quick": one.quick.value,
            }
            for one in comparison.differences
        ],
    }

"""`--oracle`: who says what files are: the quick one, a real kernel, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated

import typer

from nbdproxy.checker.both import BothOracles
from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.cli.console import err
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.quick import QuickOracle
from nbdproxy.sizes import plural


class OracleName(Enum):
    """What `--oracle` takes."""

    QUICK = "quick"
    KERNEL = "kernel"
    BOTH = "both"


OracleChoice = Annotated[
    OracleName,
    typer.Option(
        "--oracle",
        help="Who reads the files: nbdproxy itself (quick; ext2, ext3 and ext4); a guest with a "
        "real kernel (also XFS, Btrfs, FAT, exFAT, NTFS); or both, and where they differ.",
    ),
]

MAKERS: dict[OracleName, Callable[[], Oracle]] = {
    OracleName.QUICK: QuickOracle,
    OracleName.KERNEL: KernelOracle,
    OracleName.BOTH: BothOracles,
}
"""Makes each, silent, in any process; where both are asked, a difference is in the verdict."""


EXIT = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.UNKNOWN: 2}
"""The exit codes of commands that judge."""


@contextmanager
def opened(name: OracleName, tell: Callable[[str], None]) -> Iterator[Oracle]:
    """Yield the oracle that was asked for; `tell` hears what takes long."""
    oracle: Oracle
    if name is OracleName.QUICK:
        oracle = QuickOracle()
    else:
        oracle = KernelOracle(tell) if name is OracleName.KERNEL else BothOracles(tell)
    try:
        yield oracle
    finally:
        oracle.close()


def tell_differences(oracle: Oracle) -> None:
    """Say on stderr where the two oracles differed, if both were asked."""
    if not isinstance(oracle, BothOracles):
        return
    for one in oracle.differences:
        err.print(
            f"they differ: in state {one.state} the kernel finds {one.path} "
            f"{one.kernel.value}, the quick oracle {one.quick.value}",
            markup=False,
        )
    err.print(
        f"both oracles judged {plural(oracle.compared, 'state')}: "
        f"{plural(len(oracle.differences), 'difference')}",
        markup=False,
    )


def differences_json(oracle: Oracle) -> dict[str, object]:
    """Return the same for a command's JSON; nothing unless both were asked."""
    if not isinstance(oracle, BothOracles):
        return {}
    return {
        "compared": oracle.compared,
        "differences": [
            {
                "state": one.state,
                "path": one.path,
                "kernel": one.kernel.value,
                "quick": one.quick.value,
            }
            for one in oracle.differences
        ],
    }

"""Who says what files are: the quick oracle, a real kernel, or both; made by their names."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from nbdproxy.checker.both import BothOracles
from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.quick import QuickOracle


class OracleName(Enum):
    """The oracles that there are."""

    QUICK = "quick"
    KERNEL = "kernel"
    BOTH = "both"


MAKERS: dict[OracleName, Callable[[], Oracle]] = {
    OracleName.QUICK: QuickOracle,
    OracleName.KERNEL: KernelOracle,
    OracleName.BOTH: BothOracles,
}
"""Makes each, silent, in any process; where both are asked, a difference is in the verdict."""


class NamedOracle(NamedTuple):
    """An oracle, and what it noted of where two of them differ, if two are asked."""

    oracle: Oracle
    comparison: BothOracles | None


def make_oracle(name: OracleName, tell: Callable[[str], None]) -> NamedOracle:
    """Return the oracle of a name, to be closed; `tell` hears what takes long."""
    if name is OracleName.QUICK:
        return NamedOracle(QuickOracle(), None)
    if name is OracleName.KERNEL:
        return NamedOracle(KernelOracle(tell), None)
    both = BothOracles(tell)
    return NamedOracle(both, both)

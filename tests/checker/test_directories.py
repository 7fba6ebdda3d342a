"""The quick oracle and a real kernel on big directories that are torn, drawn anew in each run."""

from __future__ import annotations

import random
import secrets
import sys
from collections.abc import Iterator

import pytest

from nbdproxy.checker.oracle import KernelOracle
from tests.support import torn

pytestmark = pytest.mark.lab

STATES = 40  # of each filesystem


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelOracle]:
    oracle = KernelOracle()
    yield oracle
    oracle.close()


def test_both_say_the_same_of_torn_directories(kernel: KernelOracle) -> None:
    """Of three filesystems: one without checksums, one with, one that folds names."""
    seed = secrets.randbits(32)
    sys.stdout.write(f"seed {seed}\n")
    rng = random.Random(seed)
    plain = [one for one in torn.RECIPES if one.title.startswith(("ext2", "ext3"))]
    summed = [one for one in torn.RECIPES if one.title.startswith("ext4") and not one.is_folded]
    folded = [one for one in torn.RECIPES if one.is_folded]
    tally = torn.Tally()
    for recipes in (plain, summed, folded):
        torn.compare(kernel, rng.choice(recipes), rng, STATES, tally)
    sys.stdout.write(f"{tally}\n")
    assert not tally.differences, "\n".join(tally.differences[:20])
    assert tally.both > STATES and tally.files > tally.unknown

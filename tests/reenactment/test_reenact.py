"""Random workloads, played into a real QEMU over every kind of qcow2 file that people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode
from tests.reenactment.images import KINDS
from tests.reenactment.plays import Recorded, Workload, flushed_cuts, record


def _check(recorded: Recorded, mode: CacheMode) -> None:
    """What the driver left is what the guest had, at the end and wherever a flush was answered."""
    cuts = flushed_cuts(recorded.run)
    played = recorded.play(mode, cuts=cuts)
    exact = [cut for cut in cuts if played.exact[cut]]
    states = [(cut, recorded.above(cut, Level.COMPLETED)) for cut in exact]
    if mode is not CacheMode.WRITETHROUGH:
        # A write that was answered while a flush was in flight may be in QEMU's memory only.
        states = [one for one in states if one[1] == recorded.above(one[0], Level.FLUSHED)]
    assert len(states) > 3
    for cut, expected in states[:: len(states) // 3]:
        positions = played.positions[cut].tolist()
        assert recorded.below(played, positions, Level.COMPLETED) == expected
        if mode is not CacheMode.UNSAFE:
            assert recorded.below(played, positions, Level.FLUSHED) == expected
    end = recorded.above(len(played.exact) - 1, Level.RECEIVED)
    assert recorded.below(played, recorded.ends(played), Level.RECEIVED) == end


@pytest.mark.parametrize("kind", KINDS)
def test_the_guest_finds_what_it_flushed(kind: str, tmp_path: Path) -> None:
    image = KINDS[kind](tmp_path)
    recorded = record(image, Workload(11))
    before = {path: path.read_bytes() for path in tmp_path.glob("b*.qcow2")}
    for mode in (CacheMode.NONE, CacheMode.WRITETHROUGH, CacheMode.UNSAFE):
        _check(recorded, mode)
    assert before == {path: path.read_bytes() for path in before}

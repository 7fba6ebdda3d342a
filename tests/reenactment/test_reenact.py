"""Random workloads, played into a real QEMU over every kind of qcow2 file that people have."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode
from tests.reenactment.plays import SIZE, Recorded, Workload, flushed_cuts, record
from tests.support.serving import tool


def _content(folder: Path) -> Path:
    """A raw disk with data that compresses, and holes."""
    dice = random.Random(3)
    raw = folder / "content.raw"
    raw.write_bytes(
        b"".join(
            dice.randbytes(8192) + bytes(57344) if dice.random() < 0.6 else bytes(65536)
            for _ in range(SIZE // 65536)
        )
    )
    return raw


def _new(folder: Path, *options: str) -> Path:
    image = folder / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", *options, image, str(SIZE))
    return image


def _converted(folder: Path, *options: str) -> Path:
    image = folder / "disk.qcow2"
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, _content(folder), image)
    return image


def _on_backing_file(folder: Path) -> Path:
    """What Proxmox makes of a volume with snapshots; the name of the lower file is relative."""
    _converted(folder).rename(folder / "base.qcow2")
    options = ("-F", "qcow2", "-b", "base.qcow2", "-o", "extended_l2=on,cluster_size=128k")
    return _new(folder, *options)


def _with_snapshot(folder: Path) -> Path:
    image = _converted(folder)
    tool("qemu-img", "snapshot", "-c", "one", image)
    return image


KINDS: dict[str, Callable[[Path], Path]] = {
    "new": _new,
    "full": _converted,
    "on-backing-file": _on_backing_file,
    "zlib": lambda folder: _converted(folder, "-c"),
    "zstd": lambda folder: _converted(folder, "-c", "-o", "compression_type=zstd"),
    "snapshot": _with_snapshot,
    "small-clusters": lambda folder: _new(folder, "-o", "cluster_size=4k,lazy_refcounts=on"),
    "version-2": lambda folder: _converted(folder, "-o", "compat=0.10"),
}


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

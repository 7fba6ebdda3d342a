"""Laws: files on several filesystems are judged from state to state as from the start, and apart.

A disk with two filesystems in a guest's tree goes through states that it may get into. After each
step the follower, told only what changed, says what a new one says of the whole state; a state in
which all that it says it read is the same gets the same findings; and each file's condition is what
its own filesystem's oracle says of it, or that it cannot be told.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import check
from nbdproxy.oracles.composite import TreeCheck, split
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import locate
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.quick import QUICK
from tests.support.systems import LUKS, PART, Part, disk, manifest, with_files

MIB = 1 << 20
SECTOR = 512
FSTAB = "LABEL=root / ext4\nLABEL=boot /boot ext4\n"
EARLY = {"/boot/vmlinuz": "kernel " * 900, "/etc/passwd": "users " * 900}
LATE = {"/boot/initrd": "modules " * 900, "/etc/motd": "hello " * 900}


@dataclass(frozen=True, repr=False)
class World:
    """A disk without the files, one with all of them, where the two differ, and the tree."""

    empty: bytes
    full: bytes
    places: list[int]
    tree: Tree
    files: Manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    root = Part({"/etc/fstab": FSTAB}, "root", folders=("/boot",))
    empty = disk(folder / "disk", Part({}, "boot"), root, Part(raw=LUKS))
    full = empty
    for name, files in (("early", EARLY), ("late", LATE)):
        for number, point in ((1, "/boot"), (2, "/etc")):
            own = {p if number == 2 else p[5:]: t for p, t in files.items() if p.startswith(point)}
            full = with_files(folder / f"{name}{number}", full, number, own)
    tree, wanted = locate(QUICK, MemoryDisk(full), manifest({**EARLY, **LATE, "/srv/x": "x"}))
    fixed = [0, SECTOR, *(MIB + at * PART + more for at in range(2) for more in (1024, 4096, 8192))]
    differing = [
        at
        for at in range(0, len(full), SECTOR)
        if full[at : at + SECTOR] != empty[at : at + SECTOR]
    ]
    return World(empty, full, [*fixed, *differing], tree, wanted)


def follower(world: World) -> TreeCheck:
    return TreeCheck(QUICK, world.files, {}, world.tree)


Step = tuple[int, int]
STEPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3)), min_size=1, max_size=12)


def change(world: World, device: MemoryDisk, step: Step) -> Extent:
    """Take one sector's state of before, of later, all zeroes, or with a byte turned."""
    at = world.places[step[0] % len(world.places)]
    now = device.pread(at, SECTOR)
    device.pwrite(
        at,
        [
            world.empty[at : at + SECTOR],
            world.full[at : at + SECTOR],
            bytes(SECTOR),
            bytes([now[0] ^ 1]) + now[1:],
        ][step[1]],
    )
    return Extent(at, SECTOR)


@settings(max_examples=40, deadline=None)
@given(walk=st.lists(STEPS, min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_from_state_to_state_as_from_the_start(
    world: World, walk: Sequence[Sequence[Step]], seed: int
) -> None:
    device = MemoryDisk(world.full)
    inner = follower(world)
    inner.check(device, None)
    for steps in walk:
        changed = [change(world, device, step) for step in steps]
        found = inner.check(device, changed)
        assert found == follower(world).check(device, None)
        assert found.conditions["/srv/x"] is Condition.CANNOT_BE_TOLD
        for mount, part in split(world.files, world.tree)[0].items():
            own = check(device, part, mount=mount)
            for path, condition in own.conditions.items():
                assert found.conditions[path] is condition
    reads = inner.reads
    if reads is None:
        return
    assert [e.offset for e in reads] == sorted(e.offset for e in reads)
    rng = random.Random(seed)
    for at in range(0, device.size, SECTOR):
        if rng.random() < 0.02 and not reads.meets(at, at + SECTOR):
            device.pwrite(at, rng.randbytes(SECTOR))
    assert follower(world).check(device, None) == found

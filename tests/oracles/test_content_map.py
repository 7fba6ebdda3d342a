"""A file's data is found by its content, sector by sector, and nothing else is."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent
from nbdproxy.oracles.content_map import ContentMap
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.mounts import Tree

SECTOR = 512
SECTORS = 64
PATH = "/f"


@given(
    length=st.integers(1, 20 * SECTOR),
    seed=st.integers(0, 1 << 32),
    zero=st.sets(st.integers(0, 19), max_size=4),
    start=st.integers(0, SECTORS * SECTOR - 1),
    end=st.integers(1, SECTORS * SECTOR),
)
def test_data_is_found_wherever_it_lies(
    length: int, seed: int, zero: set[int], start: int, end: int
) -> None:
    """Pieces of the file lie about; zeroes of it are found behind what they follow, or not."""
    start = min(start, end - 1)
    dice = random.Random(seed)
    content = bytearray(dice.randbytes(length))
    for number in zero:
        content[number * SECTOR : (number + 1) * SECTOR] = bytes(
            len(content[number * SECTOR : (number + 1) * SECTOR])
        )
    disk = MemoryDisk(SECTORS * SECTOR)
    at, places, number = 0, {}, 0
    count = -(-length // SECTOR)
    while number < count:
        run = min(dice.randint(1, 5), count - number)
        at += dice.randint(0, 2)
        for one in range(number, number + run):
            places[at] = one
            disk.pwrite(at * SECTOR, bytes(content[one * SECTOR : (one + 1) * SECTOR]))
            at += 1
        number += run
    found = ContentMap(disk, PATH, bytes(content), Tree()).of(Extent.between(start, end))
    assert [one.extent.offset for one in found] == [start, *(o.extent.end for o in found[:-1])]
    assert found[-1].extent.end == end
    told = {}
    for owner in found:
        if owner.kind is not OwnerKind.FILE_DATA:
            continue
        assert owner.paths == (PATH,)
        assert owner.offset is not None
        shown = disk.pread(owner.extent.offset, owner.extent.length)
        assert (
            bytes(content[owner.offset :][: len(shown)]) == shown[: max(0, length - owner.offset)]
        )
        for byte in range(owner.extent.length):
            told[owner.extent.offset + byte] = owner.offset + byte
    for place, one in places.items():
        if any(content[one * SECTOR : (one + 1) * SECTOR]):
            for byte in (place * SECTOR, place * SECTOR + SECTOR - 1):
                if start <= byte < end:
                    assert told[byte] == one * SECTOR + byte % SECTOR
    assert set(told) <= {p * SECTOR + b for p in places for b in range(SECTOR)} | {
        byte for byte in told if not disk.pread(byte, 1)[0]
    }


def test_the_first_of_equal_sectors_is_taken_unless_another_is_expected() -> None:
    content = b"a" * SECTOR + b"b" * SECTOR + b"a" * SECTOR + b"c" * 10
    disk = MemoryDisk(SECTORS * SECTOR)
    disk.pwrite(8 * SECTOR, content[SECTOR:])
    disk.pwrite(20 * SECTOR, b"a" * SECTOR)
    found = ContentMap(disk, PATH, content, Tree()).of(Extent(0, disk.size))
    data = [(o.extent.offset, o.extent.length, o.offset) for o in found if o.offset is not None]
    assert data == [(8 * SECTOR, 3 * SECTOR, SECTOR), (20 * SECTOR, SECTOR, 0)]

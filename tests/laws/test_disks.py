"""Laws: a disk is a bytearray, and a volatile cache keeps below exactly what was landed.

Every kind of disk does the same run of operations as a bytearray and is compared with it. The
cache is driven through every legal interleaving of writes, flushes and FUA landings, beside a
reference in a few lines. Not covered: several threads at once; see tests/disks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.disks.volatile import Ticket, VolatileDisk
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.server.below.copy_before_write import PreservingDisk
from tests.support.images import write_sparse

SECTOR = 512
SIZES = (1, 3 * SECTOR, 17 * SECTOR + 1, 64 * 1024 + 100)
Operation = tuple[str, int, int, int]
"""What, first unit and units (both reduced to fit), and a byte to write; the unit is a sector, or
100 bytes, by whether the byte is even."""

operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero", "punch", "trim", "sync", "read"]),
        st.integers(0, 200),
        st.integers(0, 40),
        st.integers(0, 255),
    ),
    max_size=20,
)
contents = st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=17)
"""Blocks of 4 KiB or less: a hole (0) or data."""


def initial(size: int, blocks: list[int]) -> bytes:
    """What a disk holds at first: data and holes in turn."""
    grain = max(SECTOR, min(4096, size // len(blocks)))
    return b"".join(bytes([block]) * grain for block in blocks)[:size].ljust(size, b"\x00")


@contextmanager
def memory(folder: Path, content: bytes) -> Iterator[BlockDevice]:
    """A disk in memory."""
    yield MemoryDisk(content)


@contextmanager
def file(folder: Path, content: bytes) -> Iterator[BlockDevice]:
    """A disk in a sparse file."""
    write_sparse(folder / "image", content)
    disk = FileDisk(folder / "image")
    yield disk
    disk.close()


@contextmanager
def overlay(folder: Path, content: bytes) -> Iterator[BlockDevice]:
    """An overlay over a file, which is the same afterwards."""
    write_sparse(folder / "image", content)
    disk = OverlayDisk(FileDisk(folder / "image", read_only=True))
    yield disk
    disk.close()
    assert (folder / "image").read_bytes() == content


@contextmanager
def volatile_memory(folder: Path, content: bytes) -> Iterator[BlockDevice]:
    """A cache over memory, which holds what the cache showed after a last sync."""
    below = MemoryDisk(content)
    disk = VolatileDisk(below)
    yield disk
    shown = disk.pread(0, disk.size)
    disk.sync()
    assert below.pread(0, below.size) == shown
    assert disk.held_bytes == 0
    disk.close()


@contextmanager
def volatile_file(folder: Path, content: bytes) -> Iterator[BlockDevice]:
    """A cache over a file."""
    write_sparse(folder / "image", content)
    disk = VolatileDisk(FileDisk(folder / "image"))
    yield disk
    disk.close()


@contextmanager
def preserving(folder: Path, content: bytes) -> Iterator[BlockDevice]:
    """A file whose before-images are recorded; tests/laws/test_recording.py reads them."""
    write_sparse(folder / "image", content)
    below = FileDisk(folder / "image")
    data = tuple((one.offset, one.length) for one in below.data_extents(0, below.size))
    base = Fingerprint.of(folder / "image")
    meta = Meta(below.size, str(folder / "image"), False, data, base, (), "now", "test")
    recorder = RecordingWriter(folder / "recording", meta)
    disk = PreservingDisk(below, recorder)
    yield disk
    disk.close()
    recorder.close(Ending("done", None))


MakeDisk = Callable[[Path, bytes], AbstractContextManager[BlockDevice]]
DISKS: list[MakeDisk] = [memory, file, overlay, volatile_memory, volatile_file, preserving]


def change(disk: BlockDevice, reference: bytearray, operation: Operation) -> None:
    """Do one operation to both, and compare what can be seen of its range."""
    what, first, count, byte = operation
    unit = 100 if byte % 2 else SECTOR
    offset = first * unit % disk.size
    length = min((1 + count) * unit, disk.size - offset)
    after = bytes(length)
    if what == "write":
        after = bytes([byte]) * (length - 1) + b"\x01"
        disk.pwrite(offset, memoryview(after))
    elif what in ("zero", "punch"):
        disk.zero(offset, length, may_punch=what == "punch")
    elif what == "trim":
        disk.trim(offset, length)
    else:
        after = bytes(reference[offset : offset + length])
        if what == "sync":
            disk.sync()
    reference[offset : offset + length] = after
    assert disk.pread(offset, length) == after
    buffer = bytearray(b"\xee" * length)
    if disk.try_pread_into(offset, memoryview(buffer)):
        assert buffer == after


def assert_extents_cover(disk: BlockDevice, reference: bytearray, offset: int, length: int) -> None:
    """The data extents are in order, within the range, and hide no byte that is not zero."""
    extents = list(disk.data_extents(offset, length))
    assert all(before.end <= after.offset for before, after in pairwise(extents))
    shown = bytearray(length)
    for extent in extents:
        assert offset <= extent.offset < extent.end <= offset + length
        part = slice(extent.offset - offset, extent.end - offset)
        shown[part] = reference[extent.offset : extent.end]
    assert shown == reference[offset : offset + length]


@pytest.mark.parametrize("make", DISKS, ids=lambda make: make.__name__)
@given(st.sampled_from(SIZES), contents, operations)
@settings(max_examples=150, deadline=None)
def test_a_disk_is_a_bytearray(
    make: MakeDisk,
    size: int,
    blocks: list[int],
    changes: list[Operation],
) -> None:
    content = initial(size, blocks)
    with tempfile.TemporaryDirectory() as name, make(Path(name), content) as disk:
        assert disk.size == size
        reference = bytearray(content)
        for operation in changes:
            change(disk, reference, operation)
            offset = operation[1] * 100 % size
            assert_extents_cover(disk, reference, offset, size - offset)
        assert disk.pread(0, size) == reference
        assert_extents_cover(disk, reference, 0, size)


@dataclass(frozen=True)
class Landing:
    """A flush (`ticket` None) or a FUA write that waits for its turn; orders up to `order`."""

    order: int
    first: int
    end: int
    layer: int
    ticket: Ticket | None


class CacheReference:
    """The cache in a few lines: for each sector what is held, oldest first, and what is below."""

    def __init__(self, sectors: int) -> None:
        self.below = [0xFE] * sectors
        self.held: list[dict[int, int]] = [{} for _ in range(sectors)]

    def copy(self, job: Landing) -> None:
        """A flush brings down the newest it covers; FUA its own write, where it is held yet."""
        for sector in range(job.first, job.end):
            held = self.held[sector]
            orders = [o for o in held if (o <= job.order if job.ticket is None else o == job.order)]
            if orders:
                self.below[sector] = held[max(orders)]

    def forget(self, job: Landing) -> None:
        """Nothing as old as what landed is held on any more."""
        for sector in range(job.first, job.end):
            self.held[sector] = {o: v for o, v in self.held[sector].items() if o > job.order}

    def newest(self) -> bytes:
        """What is read."""
        pairs = zip(self.held, self.below, strict=True)
        return b"".join(bytes([h[max(h)] if h else b]) * SECTOR for h, b in pairs)


class CacheRun:
    """A cache and its reference, driven together; checks both after each step."""

    def __init__(self, sectors: int) -> None:
        self.sectors = sectors
        self.below = MemoryDisk(b"\xfe" * sectors * SECTOR)
        self.disk = VolatileDisk(self.below)
        self.reference = CacheReference(sectors)
        self.waiting: list[Landing] = []
        self.order = 0

    def change(self, what: str, first: int, count: int) -> None:
        """Write, zero or trim some sectors; the value is different each time."""
        first %= self.sectors
        end = min(self.sectors, first + 1 + count % 3)
        self.order += 1
        value = 0
        if what in ("write", "fua"):
            value = self.order % 250 + 1
            self.disk.pwrite(first * SECTOR, bytes([value]) * ((end - first) * SECTOR))
        elif what == "trim":
            self.disk.trim(first * SECTOR, (end - first) * SECTOR)
        else:
            self.disk.zero(first * SECTOR, (end - first) * SECTOR, may_punch=False)
        for sector in range(first, end):
            self.reference.held[sector][self.order] = value
        if what in ("fua", "zero-fua"):
            ticket = self.disk.issue_ticket()
            self.waiting.append(Landing(self.order, first, end, 0, ticket))

    def flush(self) -> None:
        """A flush is received; it lands later."""
        layer = self.disk.freeze()
        self.waiting.append(Landing(self.order, 0, self.sectors, layer, None))

    def copy(self, job: Landing) -> None:
        """The first half of a landing, which may run beside writes and flushes."""
        if job.ticket is not None:
            self.disk.copy_ticket_down(job.ticket)
        else:
            self.disk.copy_down(job.layer)
        self.reference.copy(job)

    def forget(self, job: Landing) -> None:
        """The second half."""
        if job.ticket is not None:
            self.disk.ticket_destaged(job.ticket)
        else:
            self.disk.destaged(job.layer)
        self.reference.forget(job)

    def check(self) -> None:
        """Below is what was landed, above what was written; the cache knows how much is held."""
        expected = b"".join(bytes([value]) * SECTOR for value in self.reference.below)
        assert self.below.pread(0, self.below.size) == expected
        assert self.disk.pread(0, self.disk.size) == self.reference.newest()
        assert self.disk.held_bytes == SECTOR * sum(map(bool, self.reference.held))


STEPS = ["write", "write", "fua", "fua", "zero", "zero-fua", "trim", "flush", "copy", "copy"]
steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), max_size=40
)


@given(st.integers(1, 4), steps)
@settings(max_examples=1000, deadline=None)
def test_below_the_cache_is_exactly_what_was_landed(
    sectors: int, chosen: list[tuple[str, int, int]]
) -> None:
    run = CacheRun(sectors)
    copying: Landing | None = None
    for what, one, two in chosen:
        if what == "flush":
            run.flush()
        elif what != "copy":
            run.change(what, one, two)
        elif copying is not None:
            run.forget(copying)
            copying = None
        elif run.waiting:
            # Clients' jobs come to the landing in any order.
            copying = run.waiting.pop(one % len(run.waiting))
            run.copy(copying)
        run.check()
    if copying is not None:
        run.forget(copying)
    run.disk.sync()
    assert run.below.pread(0, run.below.size) == run.reference.newest()
    run.disk.close()

"""Who had what no request carried below qcow2: told from files that QEMU wrote, minus entries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.unmapped import Unmapped
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.layout import file_extents
from nbdproxy.oracles.manifest import Entry
from nbdproxy.oracles.mounts import ONLY
from nbdproxy.oracles.qcow2 import Qcow2Device
from nbdproxy.requests import Command
from tests.support import ext4
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received, table_of
from tests.support.serving import tool

CLUSTER = ext4.BLOCK
DATA = ext4.content(ext4.FLUSHED)
FILE = Entry(f"/{ext4.FLUSHED}", hashlib.sha256(DATA).hexdigest(), len(DATA))
OTHER = Entry(FILE.path, hashlib.sha256(b"other").hexdigest(), len(DATA))


def differing(before: bytes, after: bytes) -> list[int]:
    """The numbers of the clusters that differ."""
    parts = range(0, len(after), CLUSTER)
    return [at // CLUSTER for at in parts if before[at:][:CLUSTER] != after[at:][:CLUSTER]]


def with_transaction(folder: Path, image: bytes) -> bytes:
    """A filesystem whose journal holds one transaction, and nothing behind it."""
    where, block, script = folder / "logged", folder / "block", folder / "script"
    where.write_bytes(image)
    block.write_bytes(bytes(CLUSTER))
    script.write_text(f"jo -c -v 3\njw -b {len(image) // CLUSTER - 1} {block}\njc\n")
    tool("debugfs", "-w", "-f", script, where)
    return where.read_bytes()


class Stored:
    """A qcow2 file before and after QEMU wrote a filesystem with FILE over an empty one."""

    def __init__(self, folder: Path, *, swapped: bool = False, logged: bool = False) -> None:
        empty, self.guest, _ = ext4.stages(folder)
        if logged:
            self.guest = with_transaction(folder, self.guest)
        raw, file = folder / "raw", folder / "file"
        raw.write_bytes(empty)
        options = ("-f", "raw", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}")
        tool("qemu-img", "convert", *options, raw, file)
        self.before = file.read_bytes()
        self.data = [
            extent.offset // CLUSTER + n
            for extent in file_extents(MemoryDisk(self.guest), FILE.path)
            for n in range(extent.length // CLUSTER)
        ]
        self.spare = ext4.SIZE // CLUSTER - 1  # free; it is allocated before the file's
        self.guest = self.guest[:-CLUSTER] + b"s" * CLUSTER
        order = [self.spare, *differing(empty, self.guest)[:-1]]
        if swapped:  # the second of the file's clusters is allocated before the first
            first = order.index(self.data[0])
            order[first : first + 2] = order[first : first + 2][::-1]
        words: list[str] = []
        for number in order:
            part = folder / f"part-{number}"
            part.write_bytes(self.guest[number * CLUSTER :][:CLUSTER])
            words += ["-c", f"write -q -s {part} {number * CLUSTER} {CLUSTER}"]
        tool("qemu-io", "-f", "qcow2", *words, file)
        self.after = file.read_bytes()

    def host(self, number: int) -> int:
        """Return the cluster of the file that a cluster of the guest is in."""
        [run] = Qcow2Device(MemoryDisk(self.after)).runs(number * CLUSTER, (number + 1) * CLUSTER)
        assert run.host is not None
        return run.host // CLUSTER

    def without(self, numbers: list[int]) -> bytes:
        """Return the file as if QEMU still had the entries of some of the guest's clusters."""
        image = bytearray(self.after)
        for number in numbers:
            for run in Qcow2Device(MemoryDisk(self.after)).runs(
                number * CLUSTER, (number + 1) * CLUSTER
            ):
                assert run.entry is not None
                image[run.entry : run.entry + 8] = bytes(8)
        return bytes(image)

    def told(
        self, entry: Entry, in_memory: list[int], *, unsent: Sequence[int] = (), more: bytes = b""
    ) -> Cause:
        """What is said of a file: entries not written, data not sent, and another cluster sent."""
        return told(self.before, self.without(in_memory) + more, entry, map(self.host, unsent))


def told(before: bytes, after: bytes, entry: Entry, left_out: Iterable[int] = ()) -> Cause:
    """What is said of a file at the end of a recording that led from one content to another."""
    before = before.ljust(len(after), b"\0")
    unsent = set(left_out)
    log: list[Received | Completed] = []
    payload = b""
    for number in differing(before, after):
        if number not in unsent:
            log += [Received(Command.WRITE, number * 8, 8), Completed(len(log))]
            payload += after[number * CLUSTER :][:CLUSTER]
    table = table_of(log)
    source = MemorySource(table, len(after), len(log), lambda: MemoryDisk(before), payload)
    with closing(Timeline(source)) as timeline:
        return Unmapped(timeline, len(log), ONLY).cause(entry)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stored"))


def test_what_fills_the_holes_is_the_file(stored: Stored) -> None:
    assert len(stored.data) > 10
    assert stored.told(FILE, stored.data) is Cause.MAPPING_NEVER_SENT
    assert stored.told(FILE, stored.data[3:5]) is Cause.MAPPING_NEVER_SENT
    assert stored.told(FILE, [stored.spare, *stored.data]) is Cause.MAPPING_NEVER_SENT


def test_clusters_that_were_not_allocated_in_a_row(tmp_path: Path) -> None:
    swapped = Stored(tmp_path, swapped=True)
    assert swapped.told(FILE, swapped.data[:2]) is Cause.MAPPING_NEVER_SENT


def test_what_does_not_fill_the_holes_convicts_nobody(stored: Stored) -> None:
    """The data of one cluster never came; that another has no entry proves nothing."""
    assert stored.told(OTHER, stored.data) is Cause.CANNOT_BE_TOLD
    unsent = stored.data[2:3]
    assert stored.told(FILE, stored.data[:3], unsent=unsent) is Cause.CANNOT_BE_TOLD


def test_a_cluster_that_nothing_leads_to_is_not_the_file_s(stored: Stored) -> None:
    """As a discard leaves it: the file has no hole, so it was the guest that had not sent it."""
    assert stored.told(OTHER, [], more=b"old" + bytes(CLUSTER - 3)) is Cause.NEVER_SENT


def test_holes_alone_are_the_guest_s(stored: Stored) -> None:
    """All that was sent is led to: nobody else can have had the data."""
    assert stored.told(FILE, stored.data, unsent=stored.data) is Cause.NEVER_SENT


def test_a_way_through_a_hole_may_lead_anywhere(stored: Stored) -> None:
    filesystem = Filesystem(MemoryDisk(stored.guest))
    root = filesystem.runs(filesystem.inode(2))[0].physical
    for number in (root, filesystem.inode_offset(2) // CLUSTER):
        assert stored.told(FILE, [number]) is Cause.CANNOT_BE_TOLD


def test_a_log_that_ends_in_a_hole_may_go_on_there(tmp_path: Path) -> None:
    stored = Stored(tmp_path, logged=True)
    assert stored.told(OTHER, [stored.spare]) is Cause.CANNOT_BE_TOLD
    assert stored.told(OTHER, []) is Cause.NEVER_SENT


def test_other_filesystems_are_not_read(tmp_path: Path) -> None:
    raw, file = tmp_path / "raw", tmp_path / "file"
    with raw.open("wb") as opened:
        opened.truncate(ext4.SIZE)
    tool("mkfs.vfat", raw)
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, file)
    image = file.read_bytes()
    image = image.ljust(-(-len(image) // 65536) * 65536, b"\0")
    assert told(image, image + b"old" + bytes(65533), FILE) is Cause.CANNOT_BE_TOLD
    assert told(image, image, FILE) is Cause.NEVER_SENT

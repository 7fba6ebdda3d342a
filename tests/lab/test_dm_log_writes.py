"""Two witnesses of one run: the guest kernel's log of its writes, and our recording of them.

The guest has dm-log-writes below ext4, and its disk is served by a recording nbdproxy. For every
flush both give what must be on the disk then; the small replayer here is written from the format's
description alone.

What is one flush in the log, and how many are in the recording (virtio-blk, Linux 6.1):

- a FLUSH is one;
- a FLUSH with FUA is two: the mapper splits a commit's preflush from its data and leaves FUA on it,
  and a disk without FUA, as virtio-blk is, gets another flush for that;
- a FUA write is a write and a flush;
- two more are QEMU's own, when it exits.

The log has one order and waits with a write for the next FLUSH that is submitted after it was done.
So the recording may hold more: what was answered before a flush came in, and the guest did not yet
know of, or what a FUA write's flush took along. It must never hold less.

Not covered: flushes of several processes at once, which the guest's kernel makes one; then the
recording has fewer (1 of 122 and 3 of 114 were missing in two runs of eight processes).
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from nbdproxy.crash.states.cuts import before_exit, resolve
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.errors import LabError
from nbdproxy.lab import run as guest
from nbdproxy.lab.guest import disk, dm_log
from nbdproxy.lab.guest.build import Lab, build_lab
from nbdproxy.lab.workloads import databases, workloads
from nbdproxy.persistence.model import Level
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy

pytestmark = pytest.mark.lab

MIB = 1 << 20
SIZE = 16 * MIB
SECTOR = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8

FILES = r"""
i=0; while [ $i -lt 12 ]; do
  dd if=/dev/urandom of=f$i bs=1000 count=$((i * 3 + 1)) conv=fsync 2> /dev/null
  echo not synced > g$i; i=$((i + 1))
done
/tools/bin/dmsetup message log 0 mark files
"""
WORKLOAD = workloads.shell(
    FILES + databases.commit_script(synchronous="full", journal="delete", transactions=12)
)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return build_lab()


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log; `sector` in units of the log's sectors."""

    sector: int
    flags: int
    data: bytes
    mark: str

    @property
    def is_write(self) -> bool:
        return bool(self.data)


def read_log(path: Path) -> Iterator[Entry]:
    with path.open("rb") as log:
        magic, version, count, sector_size = struct.unpack_from("<QQQI", log.read(SECTOR))
        assert (magic, version, sector_size) == (0x6A736677736872, 1, SECTOR)
        for _ in range(count):
            head = log.read(SECTOR)
            sector, sectors, flags, length = struct.unpack_from("<4Q", head)
            assert not flags & DISCARD, "nothing here discards"
            mark = head[32 : 32 + length].decode() if flags == MARK else ""
            yield Entry(sector, flags, log.read(sectors * SECTOR), mark)


@dataclass(frozen=True, slots=True)
class Point:
    """A flush that an entry asks for: the disk that it promises, and the entries that come later.

    number  the entry's
    later   the number of the first entry that the disk does not have
    """

    kind: str
    disk: bytes
    number: int
    later: int


def flushes_of(base: bytes, entries: list[Entry]) -> Iterator[Point]:
    state = bytearray(base)
    for number, entry in enumerate(entries):
        if entry.flags == MARK:
            continue
        if entry.flags & FLUSH:
            before = bytes(state)
            yield Point("flush", before, number, number)
            if entry.flags & FUA and not entry.is_write:
                yield Point("flush's own FUA", before, number, number)
        at = entry.sector * SECTOR
        state[at : at + len(entry.data)] = entry.data
        if entry.flags & FUA and entry.is_write:
            yield Point("FUA write", bytes(state), number, number + 1)


def marks_of(entries: list[Entry]) -> list[str]:
    return [entry.mark for entry in entries if entry.flags == MARK]


def end_of(base: bytes, entries: list[Entry]) -> bytes:
    state = bytearray(base)
    for entry in entries:
        at = entry.sector * SECTOR
        state[at : at + len(entry.data)] = entry.data
    return bytes(state)


def run(lab: Lab, target: Path | str, log: Path, ending: str) -> guest.GuestRun:
    return guest.run(
        lab,
        WORKLOAD,
        target,
        ending=workloads.parse_ending(ending),
        cache_mode="none",
        write_log=log,
    )


def promised(source: RecordedSource, number: int) -> bytes:
    """The disk that the recording promises just after its flush of that number."""
    position = resolve(source, f"flush:{number}").position
    state = open_state(source, StateId(position, Level.FLUSHED, Choice.MUST))
    content = state.pread(0, SIZE)
    state.close()
    return content


def differing(one: bytes, other: bytes) -> list[int]:
    """The numbers of the sectors that are not the same."""
    pair = (np.frombuffer(text, np.uint8).reshape(-1, SECTOR) for text in (one, other))
    return np.flatnonzero(np.not_equal(*pair).any(axis=1)).tolist()


def is_of(entries: list[Entry], number: int, content: bytes) -> bool:
    """Tell whether one of the entries writes this content to a sector."""
    for entry in entries:
        at = (number - entry.sector) * SECTOR
        if 0 <= at < len(entry.data) and entry.data[at : at + SECTOR] == content:
            return True
    return False


@pytest.mark.parametrize(
    ("ending", "last"),
    [("umount", "dm-log-writes-end"), ("sync", "settled"), ("cut", "settled")],
)
def test_every_flush_promises_the_same_in_the_log_and_in_the_recording(
    lab: Lab, tmp_path: Path, ending: str, last: str
) -> None:
    image, log = tmp_path / "disk.img", tmp_path / "log"
    disk.format_disk(image, SIZE)
    base = image.read_bytes()
    with ForkedServer(tmp_path, image, "--record", tmp_path / "run") as server:
        run(lab, f"nbd+unix:///?socket={server.socket}", log, ending)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    entries = list(read_log(log))
    assert marks_of(entries)[-1] == last
    if ending == "umount":
        assert end_of(base, entries) == image.read_bytes()
    points = list(flushes_of(base, entries))
    source = RecordedSource(tmp_path / "run")
    exit_flushes = source.table.is_flush & (source.table.seq >= before_exit(source).position)
    assert np.count_nonzero(exit_flushes) == 2
    assert len(points) == np.count_nonzero(source.table.is_flush & ~exit_flushes)
    assert len(points) > 100
    final = image.read_bytes()
    same = 0
    for number, point in enumerate(points, start=1):
        content = promised(source, number)
        ahead = differing(content, point.disk)
        same += not ahead
        for sector in ahead:
            mine = content[sector * SECTOR : (sector + 1) * SECTOR]
            assert is_of(entries[point.later :], sector, mine) or (
                # What no FLUSH came after is not listed unless the log was ended in order.
                last == "settled"
                and not any(entry.flags & FLUSH for entry in entries[point.number + 1 :])
                and mine == final[sector * SECTOR : (sector + 1) * SECTOR]
            ), (number, point.kind, sector)
    source.close()
    assert same > len(points) // 2, f"{same} of {len(points)} are the same byte for byte"


def test_a_log_is_there_though_qemu_was_killed(tmp_path: Path) -> None:
    """Asked for on the command line, and with another kind of disk before the log's."""
    image, log = tmp_path / "disk.img", tmp_path / "log"
    disk.format_disk(image, SIZE)
    base = image.read_bytes()
    log.write_text("an earlier one")
    words = ("--script", WORKLOAD.script, "--device", "virtio-scsi", "--end", "hang")
    nbdproxy("lab", "run", "-", image, *words, "--write-log", log, timeout_s=200)
    entries = list(read_log(log))
    marks = marks_of(entries)
    assert (marks[0], marks[-1]) == ("files", "settled")
    assert len(list(flushes_of(base, entries))) > 100
    assert log.stat().st_blocks * 512 < dm_log.LOG_BYTES // 16


def test_a_log_that_cannot_be_is_told(lab: Lab, tmp_path: Path) -> None:
    for log in (tmp_path, tmp_path / "nowhere" / "log"):
        with pytest.raises(LabError, match="log"):
            run(lab, tmp_path / "disk.img", log, "cut")
    without = replace(lab, programs=lab.programs - {"dmsetup"})
    with pytest.raises(LabError, match="apt-get install dmsetup"):
        run(without, tmp_path / "disk.img", tmp_path / "log", "cut")

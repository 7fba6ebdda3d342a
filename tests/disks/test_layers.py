"""Overlay and volatile cache where threads, a full disk and late landings come in.

Threads are told by a disk below that calls back while it is read: what a writer or a landing does
then is what another thread might do. The laws are in tests/laws/test_disks.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from nbdproxy.disks import volatile as volatile_module
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.disks.scratch import open_scratch
from nbdproxy.disks.volatile import VolatileDisk

S = 512


class Below(MemoryDisk):
    """A disk that is cold, calls back when it is read, fails on demand, and lists its changes."""

    def __init__(self, sectors: int) -> None:
        super().__init__(b"-" * sectors * S)
        self.while_read: Callable[[], None] = lambda: None
        self.fails = False
        self.changes: list[tuple[str, int, int]] = []

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:  # noqa: ARG002
        return False

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        callback, self.while_read = self.while_read, lambda: None
        callback()
        super().pread_into(offset, buffer)

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        if self.fails:
            raise OSError(28, "full")
        self.changes.append(("write", offset, len(data)))
        super().pwrite(offset, data)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        self.changes.append(("punch" if may_punch else "zero", offset, length))
        super().zero(offset, length, may_punch=may_punch, fast=fast)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        self.changes.append(("trim", offset, length))
        super().zero(offset, length, may_punch=True, fast=fast)

    def letters(self) -> str:
        """The letter of each sector, without calling back."""
        return letters(bytes(self._bytes))


def letters(content: bytes) -> str:
    """The first byte of each sector."""
    return content[::S].decode().replace("\x00", "0")


def test_a_flush_that_landed_first_leaves_nothing_for_its_fua_write() -> None:
    below = Below(1)
    disk = VolatileDisk(below)
    disk.pwrite(0, b"A" * S)
    ticket = disk.issue_ticket()
    layer = disk.freeze()
    disk.copy_down(layer)
    disk.destaged(layer)
    below.changes.clear()
    disk.copy_ticket_down(ticket)
    disk.ticket_destaged(ticket)
    assert below.changes == []
    assert below.letters() == "A"


def test_a_late_fua_write_takes_no_data_that_came_after_it() -> None:
    below = Below(2)
    disk = VolatileDisk(below)
    disk.pwrite(0, b"A" * S)
    ticket = disk.issue_ticket()
    disk.sync()
    disk.pwrite(S, b"B" * S)  # stands where A's data stood in the scratch file
    disk.copy_ticket_down(ticket)
    disk.ticket_destaged(ticket)
    assert below.letters() == "A-"
    assert disk.pread(0, 2 * S)[::S] == b"AB"
    disk.sync()
    assert below.letters() == "AB"


def test_only_fua_writes_leave_no_scratch_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def scratch(size: int = 0) -> int:
        opened.append(open_scratch(size))
        return opened[-1]

    monkeypatch.setattr(volatile_module, "open_scratch", scratch)
    disk = VolatileDisk(Below(4))
    disk.trim(0, S)  # never flushed, so that there is always something held
    for _ in range(8):
        disk.pwrite(S, b"A" * 2 * S)
        ticket = disk.issue_ticket()
        disk.copy_ticket_down(ticket)
        disk.ticket_destaged(ticket)
    whole_blocks_at_most = 2 * 4096 // 512
    assert os.fstat(opened[0]).st_blocks <= whole_blocks_at_most
    disk.sync()
    assert os.fstat(opened[0]).st_size == 0


def test_a_cold_read_shows_what_was_held_though_it_lands_meanwhile() -> None:
    below = Below(3)
    disk = VolatileDisk(below)
    disk.pwrite(S, b"A" * S)

    def land_and_reuse() -> None:
        disk.sync()
        disk.pwrite(2 * S, b"B" * S)

    below.while_read = land_and_reuse
    assert letters(disk.pread(0, 2 * S)) == "-A"


def test_a_cold_read_of_an_overlay_shows_what_was_written_though_more_is_meanwhile() -> None:
    below = Below(8)
    disk = OverlayDisk(below)
    disk.pwrite(5 * S, b"A" * S)
    disk.pwrite(7 * S, b"B" * S)

    def write_before() -> None:
        disk.pwrite(0, b"X" * S)
        disk.pwrite(2 * S, b"Y" * S)

    below.while_read = write_before
    assert letters(disk.pread(4 * S, 4 * S)) == "-A-B"
    disk.close()


@pytest.mark.parametrize("kind", [OverlayDisk, VolatileDisk])
def test_a_short_write_of_the_scratch_file_is_continued(
    kind: type[OverlayDisk | VolatileDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = kind(Below(4))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data)[:100], at))
    disk.pwrite(S, bytes(range(256)) * 4)
    monkeypatch.undo()
    assert disk.pread(S, 2 * S) == bytes(range(256)) * 4
    disk.close()


def test_what_the_disk_below_refused_is_held_on() -> None:
    below = Below(2)
    disk = VolatileDisk(below)
    disk.pwrite(0, b"A" * S)
    layer = disk.freeze()
    below.fails = True
    with pytest.raises(OSError, match="full"):
        disk.copy_down(layer)
    below.fails = False
    disk.pwrite(S, b"B" * S)
    assert below.letters() == "--"
    second = disk.freeze()
    disk.copy_down(second)
    disk.destaged(second)
    disk.destaged(layer)
    assert below.letters() == "AB"
    assert disk.held_bytes == 0


def test_zeroes_and_trims_arrive_below_as_what_they_were() -> None:
    below = Below(4)
    disk = VolatileDisk(below)
    disk.zero(0, S, may_punch=False)
    disk.zero(S, S, may_punch=True)
    disk.trim(2 * S, S)
    assert letters(disk.pread(0, 4 * S)) == "000-"
    assert below.changes == []
    disk.sync()
    assert below.changes == [("zero", 0, S), ("trim", S, S), ("trim", 2 * S, S)]


def test_a_write_of_many_megabytes_lands_whole() -> None:
    size = 5 * 1024 * 1024
    below = Below(size // S)
    disk = VolatileDisk(below)
    content = os.urandom(size)
    disk.pwrite(0, content)
    ticket = disk.issue_ticket()
    disk.copy_ticket_down(ticket)
    disk.ticket_destaged(ticket)
    assert disk.held_bytes == 0
    assert below.pread(0, size) == content


def test_closing_drops_what_is_held_and_twice_is_harmless() -> None:
    below = Below(1)
    disk = VolatileDisk(below)
    disk.pwrite(0, b"A" * S)
    disk.close()
    disk.close()
    assert below.letters() == "-"

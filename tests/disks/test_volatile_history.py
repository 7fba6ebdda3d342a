"""The volatile cache's history: what a cut may let survive, write-backs, and failed flushes.

One example of each rule, and what the law cannot see: order and syncs below, threads, the size of
the scratch file. The law is in tests/laws/test_volatile_law.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from nbdproxy.disks import held as held_module
from nbdproxy.disks import volatile as volatile_module
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.scratch import open_scratch
from nbdproxy.disks.volatile import Ticket, VolatileDisk

S = 512


class Below(MemoryDisk):
    """A disk that lists its changes and syncs, and calls back when it is written."""

    def __init__(self, sectors: int) -> None:
        super().__init__(b"-" * sectors * S)
        self.while_written: Callable[[], None] = lambda: None
        self.changes: list[str] = []

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        callback, self.while_written = self.while_written, lambda: None
        callback()
        self.changes.append(f"write {offset // S}+{len(data) // S}")
        super().pwrite(offset, data)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        self.changes.append(f"{'punch' if may_punch else 'zero'} {offset // S}+{length // S}")
        super().zero(offset, length, may_punch=may_punch, fast=fast)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        self.changes.append(f"trim {offset // S}+{length // S}")
        super().zero(offset, length, may_punch=True, fast=fast)

    def sync(self) -> None:
        self.changes.append("sync")


def letters(disk: MemoryDisk | VolatileDisk) -> str:
    """The first byte of each sector."""
    return disk.pread(0, disk.size)[::S].decode().replace("\x00", "0")


def write(disk: VolatileDisk, sector: int, text: str) -> None:
    """Write a sector of each letter."""
    disk.pwrite(sector * S, b"".join(letter.encode() * S for letter in text))


def land(disk: VolatileDisk, ticket: Ticket, *, sync: bool = True) -> None:
    """Both halves of the landing of one write."""
    disk.copy_ticket_down(ticket, sync=sync)
    disk.ticket_destaged(ticket)


def whole(*tickets: Ticket) -> list[tuple[Ticket, int, int]]:
    """The pieces that are these writes as a whole."""
    return [(ticket, ticket.offset, ticket.end) for ticket in tickets]


def orders(disk: VolatileDisk) -> list[int]:
    """The order numbers of all that is listed."""
    return [ticket.held.order for ticket in disk.writes()]


@pytest.fixture
def below() -> Below:
    return Below(6)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors of the scratch files opened since."""
    opened: list[int] = []

    def remember(size: int = 0) -> int:
        opened.append(open_scratch(size))
        return opened[-1]

    monkeypatch.setattr(volatile_module, "open_scratch", remember)
    return opened


@pytest.fixture
def disk(below: Below) -> Iterator[VolatileDisk]:
    disk = VolatileDisk(below, history=True)
    yield disk
    disk.close()


def test_overwritten_writes_are_listed_until_a_flush_lands(disk: VolatileDisk) -> None:
    assert disk.newest_order == 0
    for text in ("AAA", "BB", "C"):
        write(disk, 0, text)
    layer = disk.freeze()
    write(disk, 0, "D")
    assert [ticket[:2] for ticket in disk.writes()] == [(0, 3 * S), (0, 2 * S), (0, S), (0, S)]
    disk.copy_down(layer)
    assert orders(disk) == [1, 2, 3, 4]
    disk.destaged(layer)
    assert orders(disk) == [disk.newest_order] == [4]


def test_pieces_land_by_order_and_are_synced(disk: VolatileDisk, below: Below) -> None:
    write(disk, 0, "ABC")
    write(disk, 1, "XYZ")
    disk.zero(4 * S, S, may_punch=False)
    disk.trim(5 * S, S)
    first, second, zero, trim = disk.writes()
    pieces = [*whole(trim, zero), (second, 2 * S, 3 * S), (first, S, 3 * S), (first, 0, 0)]
    disk.destage_pieces(iter(pieces))
    assert below.changes == ["write 1+2", "write 2+1", "zero 4+1", "trim 5+1", "sync"]
    assert letters(below) == "-BY-00"


def test_an_overwritten_write_survives_without_the_newer_one(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "AA")
    write(disk, 0, "BB")
    old, _ = disk.writes()
    disk.destage_pieces(whole(old))
    assert letters(below) == "AA----"


def test_nothing_survives_over_what_landed_later_and_nothing_twice(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "AAAA")
    write(disk, 1, "B")
    land(disk, disk.issue_ticket())
    write(disk, 2, "C")
    written_back = disk.issue_ticket(3)
    land(disk, written_back, sync=False)
    assert below.changes == ["write 1+1", "sync", "write 2+1"]
    below.changes.clear()
    (old,) = disk.writes()
    disk.destage_pieces(whole(old, written_back))
    assert below.changes == ["write 0+1", "write 3+1", "sync"]
    assert letters(below) == "ABCA--"


def test_a_write_that_newer_ones_cover_wholly_is_gone(disk: VolatileDisk) -> None:
    write(disk, 5, "!")
    write(disk, 0, "AA")
    write(disk, 0, "B")
    write(disk, 1, "C")
    land(disk, disk.issue_ticket(4))
    assert orders(disk) == [1, 2, 3]
    land(disk, disk.issue_ticket(3))
    with pytest.raises(KeyError):
        disk.issue_ticket(2)
    assert orders(disk) == [1]
    with pytest.raises(KeyError):
        disk.issue_ticket(4)


def test_a_write_back_of_an_old_write_shows_below_and_not_above(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "AA")
    write(disk, 0, "B")
    land(disk, disk.issue_ticket(1))
    assert letters(below) == "AA----"
    assert letters(disk) == "BA----"
    assert disk.held_bytes == S
    disk.sync()
    assert letters(below) == "BA----"


def test_a_write_back_beside_writes_of_its_place(disk: VolatileDisk, below: Below) -> None:
    write(disk, 0, "AA")
    ticket = disk.issue_ticket(1)
    below.while_written = lambda: write(disk, 1, "BB")
    disk.copy_ticket_down(ticket)
    assert orders(disk) == [1, 2]
    disk.ticket_destaged(ticket)
    assert letters(disk) == "ABB---"
    assert orders(disk) == [2]
    disk.sync()
    assert letters(below) == "ABB---"


def test_a_fua_write_that_was_written_back_is_synced_all_the_same(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "A")
    ticket = disk.issue_ticket()
    land(disk, disk.issue_ticket(1), sync=False)
    land(disk, ticket)
    assert below.changes == ["write 0+1", "sync"]


def test_a_write_back_that_a_flush_overtook_takes_no_later_data(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "A")
    ticket = disk.issue_ticket(1)
    disk.sync()
    write(disk, 1, "B")  # stands where A's data stood in the scratch file
    below.changes.clear()
    land(disk, ticket, sync=False)
    assert below.changes == []
    disk.sync()
    assert letters(below) == "AB----"


def test_what_a_failed_flush_had_in_hand_is_read_and_never_lands() -> None:
    below = Below(4)
    disk = VolatileDisk(below)  # the history is not needed for this
    write(disk, 0, "AAA")
    failed = disk.freeze()
    write(disk, 1, "B")
    disk.drop(failed)
    disk.drop(failed)
    assert letters(disk) == "ABA-"
    assert disk.held_bytes == 3 * S
    disk.sync()
    assert letters(below) == "-B--"
    assert letters(disk) == "ABA-"
    assert disk.held_bytes == 2 * S
    later = disk.freeze()
    disk.copy_down(later)
    disk.destaged(later)
    assert letters(below) == "-B--"


def test_no_cut_and_no_write_back_brings_back_what_was_dropped(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "AA")
    (dropped,) = disk.writes()
    ticket = disk.issue_ticket(1)
    disk.drop(disk.freeze())
    write(disk, 1, "B")
    (kept,) = disk.writes()
    assert kept.held.order == 2
    with pytest.raises(KeyError):
        disk.issue_ticket(1)
    land(disk, ticket)
    assert letters(disk) == "AB----"
    disk.destage_pieces(whole(dropped, kept))
    assert letters(below) == "-B----"


def test_a_fua_write_outlives_a_failed_flush_but_not_what_lands_over_it(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "AAA")
    ticket = disk.issue_ticket()
    disk.drop(disk.freeze())
    write(disk, 1, "B")
    disk.sync()
    land(disk, ticket)
    assert letters(below) == letters(disk) == "ABA---"
    assert disk.held_bytes == 0


def test_a_fua_write_outlives_a_failed_flush_though_it_was_overwritten(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "A")
    ticket = disk.issue_ticket()
    write(disk, 0, "B")
    disk.drop(disk.freeze())
    land(disk, ticket)
    assert letters(below) == "A-----"
    assert letters(disk) == "B-----"


def test_a_failed_flush_gives_back_no_data_of_what_came_where_dropped_data_stood(
    disk: VolatileDisk, below: Below
) -> None:
    write(disk, 0, "AAAA")
    disk.drop(disk.freeze())
    write(disk, 0, "BBBB")
    disk.sync()  # the scratch file is empty now
    write(disk, 0, "C")
    failed = disk.freeze()
    write(disk, 1, "D")
    write(disk, 1, "E")
    disk.drop(failed)
    land(disk, disk.writes()[0])
    assert letters(below) == "BDBB--"


def test_dropped_data_that_nobody_sees_is_given_back(scratch: list[int]) -> None:
    block = 64 * 1024
    big = VolatileDisk(MemoryDisk(2 * block), history=True)
    for _ in range(20):
        big.pwrite(0, b"A" * block)
        big.pwrite(block, b"B" * block)
        big.drop(big.freeze())
    assert os.fstat(scratch[-1]).st_blocks * 512 <= 3 * block
    assert big.pread(0, 2 * block) == b"A" * block + b"B" * block
    big.pwrite(0, b"C" * 2 * block)
    big.sync()
    assert os.fstat(scratch[-1]).st_size == 0
    big.close()


def test_written_back_data_is_given_back_and_that_of_listed_writes_is_not(
    scratch: list[int],
) -> None:
    block = 64 * 1024
    below = MemoryDisk(2 * block)
    disk = VolatileDisk(below, history=True)
    disk.pwrite(0, b"A" * block)
    disk.pwrite(0, b"B" * block)
    for _ in range(20):
        disk.pwrite(block, b"C" * block)
        land(disk, disk.issue_ticket(disk.newest_order), sync=False)
    assert os.fstat(scratch[-1]).st_blocks * 512 <= 3 * block
    disk.destage_pieces(whole(disk.writes()[0]))
    assert below.pread(0, 2 * block) == b"A" * block + b"C" * block
    disk.close()


def test_many_write_backs_without_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "_PRUNE_AT_LEAST", 4)
    sectors, window, dice = 64, 8, random.Random(7)
    below = MemoryDisk(sectors * S)
    disk = VolatileDisk(below, history=True)
    newest = [0] * sectors
    for order in range(1, 1500):
        first, count = dice.randrange(sectors - 4), dice.randrange(1, 5)
        disk.pwrite(first * S, order.to_bytes(4, "big") * (count * S // 4))
        while len(disk.writes()) > window:
            ticket = disk.issue_ticket(dice.choice(orders(disk)))
            for sector in range(ticket.offset // S, ticket.end // S):
                newest[sector] = max(newest[sector], ticket.held.order)
            land(disk, ticket, sync=False)
        found = [int.from_bytes(below.pread(sector * S, 4), "big") for sector in range(sectors)]
        assert found == newest
    disk.close()


def test_without_a_history_nobody_asks_for_one(below: Below) -> None:
    disk = VolatileDisk(below)
    disk.pwrite(0, b"A" * S)
    assert disk.newest_order == 1
    with pytest.raises(AssertionError):
        disk.writes()
    with pytest.raises(AssertionError):
        disk.issue_ticket(1)
    with pytest.raises(AssertionError):
        disk.destage_pieces([])
    disk.close()

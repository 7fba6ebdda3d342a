"""On-disk structures as named fields."""

from __future__ import annotations

import struct
from typing import Annotated, NamedTuple

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.structs import Field, StructLayout


class Sample(NamedTuple):
    magic: Annotated[bytes, Field(2, "4s")]
    flags: Annotated[int, Field(8, "H")]
    total: Annotated[int, Field(10, "I")]


class Overlapping(NamedTuple):
    first: Annotated[int, Field(0, "I")]
    second: Annotated[int, Field(2, "H")]


LITTLE = StructLayout(Sample, "<", 16)
BIG = StructLayout(Sample, ">")
RAW = bytes(range(16))


def test_fields_are_unpacked_by_offset_and_byte_order() -> None:
    assert LITTLE.unpack_from(RAW) == Sample(b"\2\3\4\5", 0x0908, 0x0D0C0B0A)
    assert BIG.unpack_from(RAW) == Sample(b"\2\3\4\5", 0x0809, 0x0A0B0C0D)
    assert LITTLE.unpack_from(b"abc" + RAW, 3).total == 0x0D0C0B0A


def test_a_structure_ends_behind_its_last_field_or_where_it_is_said_to() -> None:
    assert (LITTLE.size, BIG.size) == (16, 14)
    assert [one.magic for one in LITTLE.iter_unpack(RAW + RAW[::-1])] == [RAW[2:6], RAW[13:9:-1]]
    with pytest.raises(struct.error):
        LITTLE.unpack_from(RAW[:15])
    with pytest.raises(struct.error):
        list(LITTLE.iter_unpack(RAW + b"rest"))


def test_one_field_is_read_alone() -> None:
    disk = MemoryDisk(64)
    disk.pwrite(16, RAW)
    assert LITTLE.read_field(disk, 16, "flags") == 0x0908
    assert (LITTLE.offset("total"), LITTLE.span("total")) == (10, slice(10, 14))


def test_a_checksum_counts_itself_as_zero() -> None:
    assert LITTLE.zeroed(RAW, "total") == RAW[:10] + bytes(4) + RAW[14:]


def test_fields_that_overlap_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"Overlapping\.second overlaps"):
        StructLayout(Overlapping, "<")

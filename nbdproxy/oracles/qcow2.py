"""`Qcow2Device`: the guest's disk in a qcow2 file, read-only.

For recordings from below qcow2: each crash state is a file whose tables may be older than its data.
An L2 entry that was never written reads as zeroes, as for QEMU. Source: QEMU's "The qcow2 image
format" (docs/interop/qcow2.txt).

Read are versions 2 and 3 with any cluster size, zero clusters, and clusters compressed with zlib.
Refused are backing files, encryption, external data, extended L2 entries and zstd. Refcounts are
not used, as QEMU does not use them to read. Bytes behind the file's end read as zeroes, as for
QEMU: that is what a guest gets of a file that lost its length.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated, NamedTuple

import numpy as np

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.structs import Field, StructLayout

MAGIC = b"QFI\xfb"


class Qcow2Header(NamedTuple):
    """The header of both versions, the fields that are used."""

    magic: Annotated[bytes, Field(0, "4s")]
    version: Annotated[int, Field(4, "I")]
    backing_file_offset: Annotated[int, Field(8, "Q")]
    cluster_bits: Annotated[int, Field(20, "I")]
    size: Annotated[int, Field(24, "Q")]
    crypt_method: Annotated[int, Field(32, "I")]
    l1_size: Annotated[int, Field(36, "I")]
    l1_table_offset: Annotated[int, Field(40, "Q")]
    refcount_table_offset: Annotated[int, Field(48, "Q")]
    refcount_table_clusters: Annotated[int, Field(56, "I")]
    snapshots_offset: Annotated[int, Field(64, "Q")]


class Qcow2HeaderV3(NamedTuple):
    """The fields that version 3 adds; in files of version 2 other things are in their place."""

    incompatible_features: Annotated[int, Field(72, "Q")]
    refcount_order: Annotated[int, Field(96, "I")]
    header_length: Annotated[int, Field(100, "I")]
    compression_type: Annotated[int, Field(104, "B")]


_HEADER = StructLayout(Qcow2Header, ">")
_HEADER_V3 = StructLayout(Qcow2HeaderV3, ">", 112)
_V2_FEATURES = Qcow2HeaderV3(
    incompatible_features=0, refcount_order=4, header_length=104, compression_type=0
)
"""What version 2 has, in the terms of version 3."""
_EXTERNAL_DATA, _COMPRESSION, _EXTENDED_L2 = 0x4, 0x8, 0x10
_REFUSED = {
    _EXTERNAL_DATA: "its data is in another file",
    _COMPRESSION: "it is compressed with zstd",
    _EXTENDED_L2: "it has extended L2 entries",
}
_KNOWN = 0x1F
_TABLES_LOST_MAX = 16 << 20  # bytes of L2 tables that need not be in the file
_REFCOUNTS_LOST_MAX = 1 << 16  # blocks of refcounts, of clusters that need not be in the file
_CLUSTERS_LOST_MAX = 1 << 20  # of data, that need not be in the file
_PACKED_MAX = 16  # clusters that are compressed to one, on the average, and a million more
_SLACK = 1 << 10
_LENGTH_3_MIN, _REFCOUNT_ORDER_MAX = 104, 6
_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_COPIED = 1 << 63
_ZERO = 1
_L1_MAX = 32 << 20  # bytes; QEMU opens no larger table
_CLUSTER_BITS = range(9, 22)
_DEFLATE_WINDOW = -12


class Qcow2Error(FilesystemError):
    """A qcow2 file that cannot be read here, or whose tables are broken."""


class Structure(StrEnum):
    """The structures of a qcow2 file."""

    HEADER = "qcow2 header"
    L1 = "qcow2 L1 table"
    L2 = "qcow2 L2 table"
    REFCOUNTS = "qcow2 refcounts"


class MappedRun(NamedTuple):
    """Bytes [start, end) of the guest's disk.

    host    their offset in the file; None if they read as zeroes
    entry   the offset of their first cluster's L2 entry in the file; None without an L2 table
    packed  the bytes of compressed data at `host`; 0 if they are not compressed
    """

    start: int
    end: int
    host: int | None
    entry: int | None
    packed: int = 0


def is_qcow2(device: ReadableDevice) -> bool:
    """Tell whether a disk is a qcow2 file, by its magic."""
    return device.size >= _HEADER.size and device.pread(0, len(MAGIC)) == MAGIC


class Qcow2Device:
    """The guest's disk in `base`, read-only; closing it leaves `base` open."""

    def __init__(self, base: ReadableDevice) -> None:
        """Read the header and the L1 table; raises Qcow2Error for what is not read here."""
        self._base = base
        raw = base.pread(0, min(base.size, _HEADER_V3.size)).ljust(_HEADER_V3.size, b"\0")
        header = _HEADER.unpack_from(raw)
        version, bits, size = header.version, header.cluster_bits, header.size
        if header.magic != MAGIC or version not in {2, 3} or bits not in _CLUSTER_BITS:
            raise Qcow2Error("the qcow2 header is broken")
        more = _HEADER_V3.unpack_from(raw) if version == 3 else _V2_FEATURES
        for bit, why in _REFUSED.items():
            is_set = more.incompatible_features & bit
            if is_set and (bit != _COMPRESSION or more.compression_type):
                raise Qcow2Error(f"the qcow2 file is not read here: {why}")
        if more.incompatible_features & ~_KNOWN:
            raise Qcow2Error("the qcow2 file is not read here: it has features that are not known")
        if header.backing_file_offset or header.crypt_method:
            why = "it has a backing file" if header.backing_file_offset else "it is encrypted"
            raise Qcow2Error(f"the qcow2 file is not read here: {why}")
        is_broken = (
            more.refcount_order > _REFCOUNT_ORDER_MAX
            or more.header_length < _LENGTH_3_MIN
            or header.refcount_table_offset % (1 << bits)
        )
        if is_broken:
            raise Qcow2Error("the qcow2 header is broken")
        self.size = size
        self.cluster = 1 << bits
        self._bits = bits
        refcounts = header.refcount_table_clusters << bits
        self._refcounts = Extent(header.refcount_table_offset, refcounts)
        self._has_zero = version == 3
        self._l1_offset = header.l1_table_offset
        per_table = self.cluster // 8
        needed = -(-size // (per_table * self.cluster))
        if header.l1_size < needed or header.l1_size * 8 > _L1_MAX:
            raise Qcow2Error("the qcow2 header is broken: its L1 table has an impossible size")
        self._l1 = struct.unpack(f">{needed}Q", self._read(self._l1_offset, needed * 8, "L1 table"))
        tables = [entry & _OFFSET for entry in self._l1 if entry & _OFFSET]
        if len(set(tables)) < len(tables):
            raise Qcow2Error("the qcow2 file's L1 table leads to one L2 table twice")
        # A file that lost its end may have lost tables; reading more than these takes too long.
        if len(tables) * self.cluster > max(base.size, _TABLES_LOST_MAX):
            raise Qcow2Error("the qcow2 file's L1 table leads to more L2 tables than it can have")
        self._l2: dict[int, array[int]] = {}
        self._plain = self._packed = self._beyond = 0
        self._last: tuple[tuple[int, int], bytes] | None = None

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raises Qcow2Error where a table is broken."""
        for run in self.runs(offset, offset + len(buffer)):
            part = buffer[run.start - offset : run.end - offset]
            if run.host is None:
                part[:] = bytes(len(part))
            elif run.packed:
                part[:] = self._unpacked(run)
            else:
                there = self._there(run.host, len(part))
                if there:
                    self._base.pread_into(run.host, part[:there])
                part[there:] = bytes(len(part) - there)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        for run in self.runs(offset, offset + length):
            if run.host is None:
                continue
            if run.packed:
                yield Extent.between(run.start, run.end)
                continue
            there = self._there(run.host, run.end - run.start)
            for extent in self._base.data_extents(run.host, there) if there else ():
                yield Extent(run.start + extent.offset - run.host, extent.length)

    def runs(self, start: int, end: int) -> Iterator[MappedRun]:
        """Yield all of [start, end): where it is in the file, neighbours joined."""
        assert 0 <= start <= end <= self.size
        pending: MappedRun | None = None
        while start < end:
            run = self._run(start, end)
            if pending is not None and _follows(pending, run):
                pending = pending._replace(end=run.end)
            else:
                if pending is not None:
                    yield pending
                pending = run
            start = run.end
        if pending is not None:
            yield pending

    def on_disk(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield where in the file a range of the guest's disk is, without what reads as zeroes."""
        for run in self.runs(offset, offset + length):
            if run.host is not None:
                there = self._there(run.host, run.packed or run.end - run.start)
                if there:
                    yield Extent(run.host, there)

    def structures(self) -> Iterator[tuple[Structure, Extent]]:
        """Yield the structures of the file with their extents, in whole clusters."""
        yield Structure.HEADER, Extent(0, self.cluster)
        length = -(-len(self._l1) * 8 // self.cluster) * self.cluster
        yield Structure.L1, Extent(self._l1_offset, length)
        for entry in self._l1:
            if entry & _OFFSET:
                yield Structure.L2, Extent(entry & _OFFSET, self.cluster)
        at, length = self._refcounts
        yield Structure.REFCOUNTS, self._refcounts
        # One block has the counts of 64 clusters at least; what is read must be bounded.
        most = self._base.size // (64 * self.cluster) + _REFCOUNTS_LOST_MAX
        length = self._there(at, min(length, 8 * most))
        raw = self._base.pread(at, length) if length else b""
        for block in dict.fromkeys(struct.unpack(f">{len(raw) // 8}Q", raw[: len(raw) // 8 * 8])):
            if block:
                yield Structure.REFCOUNTS, Extent(block & _OFFSET, self.cluster)

    def close(self) -> None:
        """Do nothing: the file below belongs to whoever opened it."""

    def _run(self, start: int, end: int) -> MappedRun:
        """Return where one cluster is from `start` on, or that an L2 table is missing."""
        number = start >> self._bits
        index, slot = divmod(number, self.cluster // 8)
        table = self._l1[index] & _OFFSET
        if not table:
            span = self.cluster // 8 * self.cluster
            last = self._last_empty(self._l1, index, -(-end // span))
            return MappedRun(start, min(end, (last + 1) * span), None, None)
        entries = self._table(table)
        entry = entries[slot]
        if not entry & _OFFSET and not entry & (_COMPRESSED | _ZERO):
            until = min(len(entries), slot + -(-end >> self._bits) - number)
            number += self._last_empty(entries, slot, until) - slot
        end = min(end, (number + 1) << self._bits)
        place = table + slot * 8
        if entry & _COMPRESSED:
            split = 62 - (self._bits - 8)
            at = entry & (1 << split) - 1
            length = ((entry >> split & (1 << self._bits - 8) - 1) + 1) * 512 - at % 512
            return MappedRun(start, end, at, place, length)
        if (entry & _OFFSET) % self.cluster or (entry & _ZERO and not self._has_zero):
            raise Qcow2Error("an entry of the qcow2 file's L2 table is impossible")
        if not entry & _OFFSET or entry & _ZERO:
            return MappedRun(start, end, None, place)
        return MappedRun(start, end, (entry & _OFFSET) + start % self.cluster, place)

    @staticmethod
    def _last_empty(table: Sequence[int], at: int, end: int) -> int:
        """Return the last of the entries from `at` on that lead nowhere, up to `end`."""
        while at + 1 < end and not table[at + 1] & ~_COPIED:
            at += 1
        return at

    def _table(self, at: int) -> array[int]:
        found = self._l2.get(at)
        if found is None:
            raw = self._read(at, self.cluster, "L2 table")
            self._count(raw)
            found = array("Q", raw)
            if sys.byteorder == "little":
                found.byteswap()
            self._l2[at] = found
        return found

    def _count(self, table: bytes) -> None:
        """Raise Qcow2Error for L2 tables with far more entries than the file has clusters.

        Reading the guest's disk would take too long. After a crash a few clusters may have two
        entries, as one table can be older than another.
        """
        entries = np.frombuffer(table, ">u8")
        is_packed = entries & _COMPRESSED != 0
        hosts = entries & _OFFSET
        is_there = ~is_packed & (hosts != 0) & (hosts < self._base.size)
        self._packed += int(is_packed.sum())
        self._plain += int(is_there.sum())
        self._beyond += int((~is_packed & (hosts >= self._base.size)).sum())
        clusters = -(-self._base.size // self.cluster)
        if self._packed > _PACKED_MAX * clusters + _CLUSTERS_LOST_MAX:
            raise Qcow2Error(
                "the qcow2 file has more compressed clusters than are read here; write it out "
                "with: qemu-img convert -O raw"
            )
        if self._plain > 2 * clusters + _SLACK or self._beyond > 2 * clusters + _CLUSTERS_LOST_MAX:
            raise Qcow2Error("the qcow2 file's L2 tables lead to the same clusters again and again")

    def _unpacked(self, run: MappedRun) -> bytes:
        """Return what a piece of a compressed cluster holds."""
        assert run.host is not None
        place, at = (run.host, run.packed), run.start % self.cluster
        if self._last is not None and self._last[0] == place:
            return self._last[1][at : at + run.end - run.start]
        there = self._there(run.host, run.packed)
        data = self._base.pread(run.host, there) if there else b""
        try:
            whole = zlib.decompressobj(_DEFLATE_WINDOW).decompress(data, self.cluster)
        except zlib.error:
            whole = b""
        if len(whole) < self.cluster:
            raise Qcow2Error("a compressed cluster of the qcow2 file is broken")
        self._last = place, whole
        return whole[at : at + run.end - run.start]

    def _read(self, at: int, length: int, what: str) -> bytes:
        if at % self.cluster:
            raise Qcow2Error(f"the qcow2 file's {what} is at an impossible place")
        there = self._there(at, length)
        return (self._base.pread(at, there) if there else b"").ljust(length, b"\0")

    def _there(self, at: int, length: int) -> int:
        """Return how much of a piece of the file is before its end."""
        return max(0, min(length, self._base.size - at))


def _follows(one: MappedRun, other: MappedRun) -> bool:
    """Tell whether two neighbours are also neighbours in the file."""
    if one.packed or other.packed:
        return False
    if one.host is None or other.host is None:
        return one.host is other.host and (one.entry is None) is (other.entry is None)
    return one.host + one.end - one.start == other.host

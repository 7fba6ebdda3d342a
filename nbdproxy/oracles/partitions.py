"""Where on a disk a filesystem may begin: the disk, its partitions, and the volumes in either.

GPT (UEFI specification, chapter 5): the header and the table are accepted with right checksums
only; if those at the start are broken, the backup at the end counts, as in the kernel. MBR:
primary partitions 1 to 4, logical ones from 5. What points outside the disk is left out. LVM: see
`lvm`. Of a qcow2 file the guest's disk inside is looked at, see `qcow2`.
Not covered: RAID, LUKS, BSD labels, and LVM volumes that are not linear.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.formats import refuse_foreign
from nbdproxy.extents import Extent
from nbdproxy.oracles import lvm, qcow2
from nbdproxy.oracles.lvm import LinearDevice

SECTOR = 512
GPT_SECTORS = (512, 4096)
GPT_MAGIC = b"EFI PART"
GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
GPT_ENTRY_SIZE_MIN = 128
GPT_TABLE_SIZE_MAX = 1 << 20
MBR_SIGNATURE = b"\x55\xaa"
MBR_ENTRY = struct.Struct("<B3sB3sII")  # active, CHS, type, CHS, first sector, sectors
PROTECTIVE = 0xEE
EXTENDED = {0x05, 0x0F, 0x85}
VOLUMES = 1001
LOGICAL_MAX = 128  # a chain longer than this is a loop


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a disk; number 0 is the whole disk, the others count as in /dev/sda1.

    LVM's volumes count from VOLUMES, by name. `offset` is where it begins, unless it is no single
    run of the disk and `is_direct` is not set.
    """

    number: int
    name: str
    offset: int
    length: int
    device: ReadableDevice
    is_direct: bool = True

    def on_disk(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield where on the disk a range of the part is, as far as it is anywhere."""
        return _below(self.device, offset, length)


class SliceDevice:
    """A window on a disk: reads are moved by `offset`; closing it leaves the disk open."""

    def __init__(self, base: ReadableDevice, offset: int, length: int) -> None:
        assert offset >= 0 and offset + length <= base.size
        self._base = base
        self._offset = offset
        self._length = length

    @property
    def size(self) -> int:
        """The window's size in bytes."""
        return self._length

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        assert offset + length <= self._length
        return self._base.pread(self._offset + offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; may block on a cold page."""
        assert offset + len(buffer) <= self._length
        self._base.pread_into(self._offset + offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        for extent in self._base.data_extents(self._offset + offset, length):
            yield Extent(extent.offset - self._offset, extent.length)

    def on_disk(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield where on the disk a range of the window is."""
        return _below(self._base, self._offset + offset, length)

    def close(self) -> None:
        """Do nothing: the disk below belongs to whoever opened it."""


class _VolumeDevice(LinearDevice):
    """A volume on a disk or on a part of one."""

    def on_disk(self, offset: int, length: int) -> Iterator[Extent]:
        for extent in super().on_disk(offset, length):
            yield from _below(self._base, extent.offset, extent.length)


def slices(device: ReadableDevice) -> list[Slice]:
    """Return the whole disk, its partitions in the order of their numbers, and its volumes.

    Raises Qcow2Error for a qcow2 file that cannot be read, ForeignFormatError for other images.
    """
    refuse_foreign(device)
    is_qcow2 = qcow2.is_qcow2(device)
    if is_qcow2:
        device = qcow2.Qcow2Device(device)
    found = _partitions(device)
    number = VOLUMES
    for part in list(found):
        for volume in lvm.volumes(part.device):
            is_direct = len(volume.pieces) == 1
            offset = part.offset + volume.pieces[0].offset if is_direct else 0
            view = _VolumeDevice(part.device, volume.pieces)
            name = f"volume {volume.name}"
            found.append(Slice(number, name, offset, view.size, view, is_direct))
            number += 1
    return [replace(part, is_direct=False) for part in found] if is_qcow2 else found


def _below(device: ReadableDevice, offset: int, length: int) -> Iterator[Extent]:
    """Yield where a range of a device is on the disk that it stands on in the end."""
    if isinstance(device, (SliceDevice, LinearDevice, qcow2.Qcow2Device)):
        yield from device.on_disk(offset, length)
    else:
        yield Extent(offset, length)


def _partitions(device: ReadableDevice) -> list[Slice]:
    found = [Slice(0, "whole disk", 0, device.size, device)]
    mbr = _sector(device, 0)
    if mbr is None or mbr[510:] != MBR_SIGNATURE:
        return found
    entries = list(_mbr_entries(mbr))
    if any(kind == PROTECTIVE for kind, _, _ in entries):
        ranges = _gpt(device)
    else:
        ranges = [*_primary(entries), *_logical(device, entries)]
    for number, offset, length in ranges:
        if length > 0 and offset + length <= device.size:
            view = SliceDevice(device, offset, length)
            found.append(Slice(number, f"partition {number}", offset, length, view))
    return found


def _sector(device: ReadableDevice, number: int) -> bytes | None:
    if (number + 1) * SECTOR > device.size:
        return None
    return device.pread(number * SECTOR, SECTOR)


def _mbr_entries(sector: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (type, first sector, sectors) of the four entries."""
    for at in range(446, 510, 16):
        _, _, kind, _, first, count = MBR_ENTRY.unpack_from(sector, at)
        yield kind, first, count


def _primary(entries: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    for number, (kind, first, count) in enumerate(entries, start=1):
        if kind and kind not in EXTENDED:
            yield number, first * SECTOR, count * SECTOR


def _logical(
    device: ReadableDevice, entries: list[tuple[int, int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Follow the chain of extended boot records; links count from the extended partition."""
    base = next((first for kind, first, _ in entries if kind in EXTENDED), None)
    if base is None:
        return
    number, here = 5, base
    for _ in range(LOGICAL_MAX):
        sector = _sector(device, here)
        if sector is None or sector[510:] != MBR_SIGNATURE:
            return
        link = None
        for kind, first, count in list(_mbr_entries(sector))[:2]:
            if kind in EXTENDED:
                link = base + first
            elif kind and count:
                yield number, (here + first) * SECTOR, count * SECTOR
                number += 1
        if link is None:
            return
        here = link


def _gpt(device: ReadableDevice) -> list[tuple[int, int, int]]:
    for sector_size in GPT_SECTORS:
        for at in (1, device.size // sector_size - 1):
            found = _gpt_table(device, sector_size, at)
            if found is not None:
                return found
    return []


def _gpt_table(
    device: ReadableDevice, sector_size: int, at: int
) -> list[tuple[int, int, int]] | None:
    """Read the header in sector `at` and its table; None unless both checksums are right."""
    if at < 1 or (at + 1) * sector_size > device.size:
        return None
    raw = device.pread(at * sector_size, sector_size)
    magic, _, size, crc, _, here, *_, table, count, width, table_crc = GPT_HEADER.unpack_from(raw)
    if magic != GPT_MAGIC or here != at or not GPT_HEADER.size <= size <= sector_size:
        return None
    end = table * sector_size + count * width
    if (
        crc != zlib.crc32(raw[:16] + bytes(4) + raw[20:size])
        or width < GPT_ENTRY_SIZE_MIN
        or count * width > GPT_TABLE_SIZE_MAX
        or end > device.size
    ):
        return None
    entries = device.pread(table * sector_size, count * width)
    if zlib.crc32(entries) != table_crc:
        return None
    result = []
    for index in range(count):
        kind, _, first, last = struct.unpack_from("<16s16sQQ", entries, index * width)
        if kind != bytes(16) and first <= last:
            result.append((index + 1, first * sector_size, (last - first + 1) * sector_size))
    return result

"""Where on a disk a filesystem may begin: the disk itself, its partitions, and logical volumes.

Partitions are read by `partition_table`, volumes by `lvm`; of a qcow2 file the guest's disk inside
is used, see `qcow2`. Not covered is what only a guest can assemble: RAID, LUKS, pools; `survey`
detects these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.formats import refuse_foreign
from nbdproxy.extents import Extent
from nbdproxy.oracles import lvm, qcow2
from nbdproxy.oracles.filesystems import kind_of
from nbdproxy.oracles.lvm import LinearDevice, LogicalVolume, PhysicalVolume
from nbdproxy.oracles.partition_table import Partition, read_table
from nbdproxy.oracles.signatures import signatures

VOLUMES = 1001


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a disk; number 0 is the whole disk, the others count as in /dev/sda1.

    LVM's volumes count from VOLUMES, by name. `offset` is where it begins, unless it is no single
    run of the disk and `is_direct` is not set. `partition` or `volume` says what it is, if any.
    """

    number: int
    name: str
    offset: int
    length: int
    device: ReadableDevice
    is_direct: bool = True
    partition: Partition | None = None
    volume: LogicalVolume | None = None

    @property
    def key(self) -> int | str:
        """Its name in all states of a disk: its number, or the name of a volume."""
        return self.number if self.volume is None else self.volume.name

    def on_disk(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield where on the disk a range of the part is, as far as it is anywhere."""
        return _below(self.device, offset, length)


class DiskLayout(NamedTuple):
    """How a disk is divided.

    slices     what may hold a filesystem
    doubt      why a guest may see other partitions, if so
    physicals  LVM's physical volumes, by the number of their slice
    closed     LVM's volumes that are no run of bytes of this disk
    """

    slices: list[Slice]
    doubt: str | None
    physical_volumes: dict[int, PhysicalVolume]
    unreadable_volumes: list[LogicalVolume]


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
    return disk_layout(device).slices


def disk_layout(device: ReadableDevice) -> DiskLayout:
    """Return how a disk is divided; raises Qcow2Error and ForeignFormatError as `slices` does."""
    refuse_foreign(device, footers=False)  # a verdict must not depend on a disk's last sector
    is_qcow2 = qcow2.is_qcow2(device)
    if is_qcow2:
        device = qcow2.Qcow2Device(device)
    found, doubt = _found(device)
    physical_volumes = {
        part.number: one
        for part in found
        if (one := lvm.physical_volume(part.device, part.offset)) is not None
    }
    unreadable_volumes = []
    number = VOLUMES
    for volume in lvm.logical_volumes(physical_volumes.values()):
        if volume.obstacle is not None:
            unreadable_volumes.append(volume)
            continue
        is_direct = len(volume.pieces) == 1
        offset = volume.pieces[0].offset if is_direct else 0
        view = _VolumeDevice(device, volume.pieces)
        name = f"volume {volume.name}"
        found.append(Slice(number, name, offset, view.size, view, is_direct, volume=volume))
        number += 1
    if is_qcow2:
        found = [replace(part, is_direct=False) for part in found]
    return DiskLayout(found, doubt, physical_volumes, unreadable_volumes)


def _below(device: ReadableDevice, offset: int, length: int) -> Iterator[Extent]:
    """Yield where a range of a device is on the disk below all windows and volumes."""
    if isinstance(device, (SliceDevice, LinearDevice, qcow2.Qcow2Device)):
        yield from device.on_disk(offset, length)
    else:
        yield Extent(offset, length)


def _found(device: ReadableDevice) -> tuple[list[Slice], str | None]:
    """Return the whole disk and its partitions, and the doubt about the table."""
    found = [Slice(0, "whole disk", 0, device.size, device)]
    table = read_table(device, _begins)
    for partition in table.partitions:
        offset, length = partition.offset, partition.length
        if length > 0 and offset + length <= device.size:
            view = SliceDevice(device, offset, length)
            name = f"partition {partition.number}"
            found.append(Slice(partition.number, name, offset, length, view, partition=partition))
    return found, table.doubt


def _begins(device: ReadableDevice, offset: int) -> bool:
    """Tell whether a filesystem, physical volume or other signature is at an offset."""
    rest = SliceDevice(device, offset, device.size - offset)
    if kind_of(rest) is not None or lvm.physical_volume(rest) is not None:
        return True
    return next(signatures(rest), None) is not None

"""Finds a file's bytes on the disk by their content: for filesystems that only a kernel reads.

Sectors of the disk are compared with the file's. Found is data that is stored as it is: not if it
is compressed, nor what is kept within metadata, as of small files on Btrfs and NTFS. Any sector
with the file's content counts as the file's, so only ranges that an oracle read to find the file
may be looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.owners import Owner, OwnerMap

_SECTOR = 512
_ZEROES = bytes(_SECTOR)


class ContentMap:
    """An `OwnerMap` that also finds the data of one file, by its content."""

    def __init__(self, device: ReadableDevice, path: str, content: bytes, tree: Tree) -> None:
        self._owners = OwnerMap(device, tree)
        self._device = device
        self._path = path
        self._sectors = [
            content[at : at + _SECTOR].ljust(_SECTOR, b"\0")
            for at in range(0, len(content), _SECTOR)
        ]
        self._length = len(content)
        self._first: dict[bytes, int] = {}
        for number, sector in enumerate(self._sectors):
            if sector != _ZEROES:
                self._first.setdefault(sector, number)

    def of(self, extent: Extent) -> list[Owner]:
        """Return the owners of all bytes of an extent, in order."""
        return [part for owner in self._owners.of(extent) for part in self._with_content(owner)]

    def _with_content(self, owner: Owner) -> Iterator[Owner]:
        if owner.kind is not OwnerKind.UNKNOWN:
            yield owner
            return
        start, end = owner.extent.offset, owner.extent.end
        for number, low, high in self._runs(start, end):
            extent = Extent.between(low, high)
            if number is None:
                yield replace(owner, extent=extent)
            else:
                offset = number * _SECTOR + low % _SECTOR
                yield Owner(extent, OwnerKind.FILE_DATA, (self._path,), offset)

    def _runs(self, start: int, end: int) -> Iterator[tuple[int | None, int, int]]:
        """Yield runs of the file's sectors, and of others: the first number, start and end."""
        low, first, following = start, None, None
        for at in range(start - start % _SECTOR, end, _SECTOR):
            length = min(_SECTOR, self._device.size - at)
            number = self._number(self._device.pread(at, length), following)
            begins = max(at, start)
            if begins > low and number != (following if first is not None else None):
                yield first, low, begins
                low, first = begins, number
            elif begins == low:
                first = number
            following = None if number is None else number + 1
        if low < end:
            yield first, low, end

    def _number(self, sector: bytes, expected: int | None) -> int | None:
        """Return which of the file's sectors this is, by preference the expected one."""
        if expected is not None and expected < len(self._sectors):
            length = min(_SECTOR, self._length - expected * _SECTOR)
            if sector[:length] == self._sectors[expected][:length]:
                return expected
        return self._first.get(sector)

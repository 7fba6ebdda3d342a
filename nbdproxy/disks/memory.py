"""A disk in memory: the simplest one, for tests and for small scratch disks."""

from __future__ import annotations

from collections.abc import Iterator

from nbdproxy.extents import Extent


class MemoryDisk:
    """A bytearray as a `BlockDevice`."""

    def __init__(self, content: int | bytes) -> None:
        self._bytes = bytearray(content)
        self.size = len(self._bytes)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        return bytes(self._bytes[offset : offset + length])

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        buffer[:] = self._bytes[offset : offset + len(buffer)]

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer`; memory never blocks."""
        self.pread_into(offset, buffer)
        return True

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`."""
        self._bytes[offset : offset + len(data)] = data

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_punch: bool,  # noqa: ARG002
        fast: bool = False,  # noqa: ARG002
    ) -> None:
        """Make a range read as zeroes."""
        self._bytes[offset : offset + length] = bytes(length)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Give a range back; it reads as zeroes afterwards."""
        self.zero(offset, length, may_punch=True, fast=fast)

    def will_need(self, offset: int, length: int) -> None:
        """Do nothing: memory is always there."""

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield the whole range: memory knows no holes."""
        yield Extent(offset, length)

    def sync(self) -> None:
        """Do nothing: memory has nothing below it."""

    def close(self) -> None:
        """Do nothing: memory goes with its last reference."""

"""What every disk in this package looks like to the rooms above.

A disk is a bytearray of fixed size with holes: any run of writes, zeroes and trims leaves what the
same run would leave in a bytearray (TRIM zeroes here; `nbdproxy.persistence` models that a real
disk may do otherwise). Offsets and lengths are bytes; callers stay within `size`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from nbdproxy.extents import Extent


class ReadableDevice(Protocol):
    """A disk one can look at: an image, an overlay, a crash state."""

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        ...

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; may block on a cold page."""
        ...

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield, ascending and disjoint, what may hold anything but zeroes."""
        ...

    def close(self) -> None:
        """Release what the disk holds; closing twice is harmless."""
        ...


class BlockDevice(ReadableDevice, Protocol):
    """A disk one can also write."""

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that does not block; False leaves it undefined."""
        ...

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`; visible to every later read, durable only after `sync`."""
        ...

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        """Make a range read as zeroes; keep it allocated unless `may_punch`.

        Where that would take writing them, `fast` raises OSError (EOPNOTSUPP) and changes nothing.
        """
        ...

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Give a range back; it reads as zeroes afterwards. `fast` is as for `zero`."""
        ...

    def will_need(self, offset: int, length: int) -> None:
        """Take the hint that a range is going to be read; may block."""
        ...

    def sync(self) -> None:
        """Make everything written so far durable; blocks."""
        ...

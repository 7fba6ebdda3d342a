"""Copy-before-write: what an image holds is recorded before it is changed for the first time.

Stands directly on the image, below every cache, so that what is saved is what the image held when
the recording began. Only what was data then has to be saved; holes were zeroes and are known from
the recording's META.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.extents import Extent
from nbdproxy.policy.engine import Decision
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Request
from nbdproxy.server.below.failures import NOT_SAVED, ToldError
from nbdproxy.server.below.store import Over, StackedStore, Store

GRANULE = 4096
"""Bytes that are saved together: a filesystem block, which most writes are multiples of."""


_AT_ONCE = 256
"""Granules read at once: 1 MiB."""

_CHUNK = 1024
"""Granules that are kept in mind together: 4 MiB of the disk, a byte for each."""

_THREADS = 16
"""Threads that save before-images of one disk."""


class CopyBeforeWriteStore(StackedStore):
    """Records on the image or remote store `below`, as its disk `saving` would, what is changed.

    `prepare` saves what a batch is going to change. A change whose before-image could not be saved
    then tries once more, and is not done if that fails.
    """

    def __init__(self, below: Store, saving: PreservingDisk) -> None:
        super().__init__(below)
        self.disk = saving
        self._saving = saving
        self._unsaved = saving.unsaved
        self._change_below = below.try_change
        self._threads = trio.CapacityLimiter(_THREADS)

    async def prepare(self, changes: Sequence[Request]) -> None:
        """Save what is there: at once what is in the page cache, and all else in a thread."""
        ranges = [(request.offset, request.length) for request in changes]
        if cold := self._saving.save_warm(ranges):
            await trio.to_thread.run_sync(self._saving.save_all, cold, limiter=self._threads)

    def try_change(self, request: Request, seq: int, /) -> bool:
        """Save what is there if it is in the page cache, and do the change."""
        offset, length = request.offset, request.length
        if self._unsaved(offset, length) and not self._saving.save(offset, length, wait=False):
            return False
        return self._change_below(request, seq)

    async def change(
        self, request: Request, seq: int, decision: Decision | None, over: Over, /
    ) -> None:
        """Save what is there, and do the change."""
        try:
            await self._save(request)
        except BaseException:
            over(False)
            raise
        await self._below.change(request, seq, decision, over)

    async def _save(self, request: Request) -> None:
        ranges = [(request.offset, request.length)]
        if self._unsaved(*ranges[0]):
            try:
                await trio.to_thread.run_sync(self._saving.save_all, ranges, limiter=self._threads)
            except ToldError:
                raise ToldError(NOT_SAVED) from None


class PreservingDisk:
    """`below`, as a `BlockDevice` that records before-images; for what stands on it, caches too.

    Owns `below`.

    Memory follows what is written: about 1 KiB for each 4 MiB of the disk that are touched, and a
    tenth of that when all of these are saved.
    The event loop and a thread may save the same place at once: it is recorded twice then, and
    readers take the first, which is the one from before every change.
    """

    def __init__(self, below: BlockDevice, recorder: RecordingWriter) -> None:
        self._below = below
        self._recorder = recorder
        self.size = below.size
        self._starts = [start // GRANULE for start, _ in recorder.meta.data]
        self._ends = [-(-(start + length) // GRANULE) for start, length in recorder.meta.data]
        # Of each granule whether it has to be saved yet; nothing where none has.
        self._chunks: dict[int, bytearray | bytes] = {}

    def unsaved(self, offset: int, length: int) -> bool:
        """Tell whether a change of this range has something to save first."""
        first, last = offset // GRANULE, -(-(offset + length) // GRANULE)
        number = first // _CHUNK
        start = number * _CHUNK
        if last - start > _CHUNK:
            return self._next_unsaved(first, last) is not None
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._begin(number)
        return chunk.find(1, first - start, last - start) >= 0

    def _next_unsaved(self, first: int, last: int) -> tuple[int, int] | None:
        """Return the first run of granules of [first, last) to be saved, as (start, end)."""
        while first < last:
            number, low = divmod(first, _CHUNK)
            start, high = first - low, min(low + last - first, _CHUNK)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._begin(number)
            at = chunk.find(1, low, high)
            if at >= 0:
                high = min(high, at + _AT_ONCE)
                end = chunk.find(0, at, high)
                return start + at, start + (high if end < 0 else end)
            first = start + high
        return None

    def _begin(self, number: int) -> bytearray | bytes:
        """Keep of a chunk which granules were data at the start."""
        first, chunk = number * _CHUNK, bytearray(_CHUNK)
        at = bisect_right(self._ends, first)
        while at < len(self._starts) and self._starts[at] < first + _CHUNK:
            low = max(self._starts[at] - first, 0)
            high = min(self._ends[at] - first, _CHUNK)
            chunk[low:high] = b"\x01" * (high - low)
            at += 1
        # Another thread may have begun it, and saved some of it.
        return self._chunks.setdefault(number, chunk if 1 in chunk else b"")

    def _note_saved(self, first: int, end: int) -> None:
        number, low = divmod(first, _CHUNK)
        chunk = self._chunks[number]
        if isinstance(chunk, bytearray):
            chunk[low : low + end - first] = bytes(end - first)
            if 1 not in chunk:
                self._chunks[number] = b""

    def save(self, offset: int, length: int, *, wait: bool = True) -> bool:
        """Record what is in the range and not saved yet.

        Without `wait`, False says that a cold page stopped it: call again from a thread.
        """
        first, last = offset // GRANULE, -(-(offset + length) // GRANULE)
        while (run := self._next_unsaved(first, last)) is not None:
            first, end = run
            start = first * GRANULE
            content = bytearray(min(end * GRANULE, self.size) - start)
            if wait:
                self._below.pread_into(start, memoryview(content))
            elif not self._below.try_pread_into(start, memoryview(content)):
                return False
            self._recorder.before(start, content)
            self._note_saved(first, end)
            first = end
        return True

    def save_warm(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Save what is in the page cache, if it is little; return what is left for a thread."""
        left, room = [], _AT_ONCE * GRANULE
        for offset, length in ranges:
            if not self.unsaved(offset, length):
                continue
            if length <= room and self.save(offset, length, wait=False):
                room -= length
            else:
                left.append((offset, length))
        return left

    def save_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Record what is in all these ranges and not saved yet; blocks."""
        for offset, length in ranges:
            self.save(offset, length)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        return self._below.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self._below.pread_into(offset, buffer)

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` if that does not block."""
        return self._below.try_pread_into(offset, buffer)

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Save what is there, then write."""
        if self.unsaved(offset, len(data)):
            self.save(offset, len(data))
        self._below.pwrite(offset, data)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        """Save what is there, then zero."""
        if self.unsaved(offset, length):
            self.save(offset, length)
        self._below.zero(offset, length, may_punch=may_punch, fast=fast)

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Save what is there, then trim."""
        if self.unsaved(offset, length):
            self.save(offset, length)
        self._below.trim(offset, length, fast=fast)

    def will_need(self, offset: int, length: int) -> None:
        """Hand the hint on."""
        self._below.will_need(offset, length)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what holds data."""
        return self._below.data_extents(offset, length)

    def sync(self) -> None:
        """Make everything written so far durable."""
        self._below.sync()

    def close(self) -> None:
        """Close the disk below."""
        self._below.close()

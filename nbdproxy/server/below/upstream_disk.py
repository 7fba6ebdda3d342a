"""An upstream as a `BlockDevice`, for code that runs in trio's threads: caches, before-images."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import trio

from nbdproxy.extents import Extent
from nbdproxy.nbd.constants import MAX_PAYLOAD, BlockState, TransmissionFlag
from nbdproxy.requests import Command, CommandFlag, Request
from nbdproxy.server.below.upstream import Upstream

_NOTHING = memoryview(b"")


class UpstreamDisk:
    """The disk behind an upstream; every call but `close` blocks a thread that trio started.

    Reads may be of any bytes: what is below is asked for whole blocks.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.size = upstream.info.size
        self._block = max(upstream.info.min_block, 1)
        # What the server would take may be more than what we ask for.
        self._most = min(upstream.info.max_payload, MAX_PAYLOAD) // self._block * self._block

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        end = offset + len(buffer)
        first, last = offset // self._block * self._block, -(-end // self._block) * self._block
        for at in range(first, last, self._most):
            piece = memoryview(bytearray(min(self._most, last - at)))
            trio.from_thread.run(self._upstream.read_into, at, piece)
            low, high = max(at, offset), min(at + len(piece), end)
            buffer[low - offset : high - offset] = piece[low - at : high - at]

    def try_pread_into(self, offset: int, buffer: memoryview) -> bool:  # noqa: ARG002
        """Say no: another server is always waited for."""
        return False

    def pwrite(self, offset: int, data: memoryview | bytes) -> None:
        """Write `data` at `offset`."""
        for at in range(0, len(data), self._most):
            piece = memoryview(data)[at : at + self._most]
            self._change(Command.WRITE, offset + at, len(piece), payload=piece)

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        """Make a range read as zeroes, by writing them if the server cannot."""
        can = self._upstream.info.flags
        if can & TransmissionFlag.SEND_WRITE_ZEROES:
            flags = 0 if may_punch else int(CommandFlag.NO_HOLE)
            if fast and can & TransmissionFlag.SEND_FAST_ZERO:
                flags |= CommandFlag.FAST_ZERO
            if not fast or flags & CommandFlag.FAST_ZERO:
                self._change(Command.WRITE_ZEROES, offset, length, flags=flags)
                return
        if fast:
            raise OSError(errno.EOPNOTSUPP, "zeroes are not faster than writing here")
        for at in range(offset, offset + length, self._most):
            self.pwrite(at, bytes(min(self._most, offset + length - at)))

    def trim(self, offset: int, length: int, *, fast: bool = False) -> None:
        """Make a range read as zeroes: what a TRIM leaves behind, only its server knows."""
        self.zero(offset, length, may_punch=True, fast=fast)

    def _change(
        self,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        payload: memoryview = _NOTHING,
    ) -> None:
        request = Request(command, flags, 0, offset, length, payload)
        trio.from_thread.run(self._upstream.change, request, lambda: None)

    def will_need(self, offset: int, length: int) -> None:
        """Pass the hint on, where the server takes it."""
        if self._upstream.info.flags & TransmissionFlag.SEND_CACHE:
            trio.from_thread.run(self._upstream.will_need, offset, length)

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what the server does not call zeroes, ascending."""
        end = offset + length
        while offset < end:
            asked = Request(Command.BLOCK_STATUS, 0, 0, offset, end - offset, _NOTHING)
            for count, flags in trio.from_thread.run(self._upstream.status, asked):
                if not flags & BlockState.ZERO and offset < end:
                    yield Extent(offset, min(count, end - offset))
                offset += count

    def sync(self) -> None:
        """Make everything written so far durable, as far as the server honours a FLUSH."""
        trio.from_thread.run(self._upstream.flush)

    def close(self) -> None:
        """Do nothing: the connection belongs to who made it."""

"""Replies of a batch, put together in place so that one system call sends them."""

from __future__ import annotations

from nbdproxy.nbd.codec import SIMPLE_REPLY
from nbdproxy.nbd.constants import SIMPLE_REPLY_MAGIC

_ARENA = 1024 * 1024
_HEADER = SIMPLE_REPLY.size


class Replies:
    """Collects simple replies; READ data is read straight into its place behind the header."""

    def __init__(self) -> None:
        self._arena = memoryview(bytearray(_ARENA))
        self._current = self._arena
        self._used = 0
        self._full: list[memoryview] = []

    def add(self, cookie: int, error: int) -> None:
        """Add a reply without data."""
        place = self._reserve(_HEADER)
        SIMPLE_REPLY.pack_into(place, 0, SIMPLE_REPLY_MAGIC, error, cookie)

    def reserve_read(self, cookie: int, length: int) -> memoryview:
        """Add a successful READ's reply and return the place for its data."""
        place = self._reserve(_HEADER + length)
        SIMPLE_REPLY.pack_into(place, 0, SIMPLE_REPLY_MAGIC, 0, cookie)
        return place[_HEADER:]

    def take_back_read(self, length: int) -> None:
        """Drop the READ that was reserved last."""
        self._used -= _HEADER + length

    def take(self) -> list[memoryview]:
        """Return all there is to send and begin anew.

        The views are reused by the next batch: they must be sent before anything is added.
        """
        parts = [*self._full, self._current[: self._used]] if self._used else self._full
        self._full = []
        self._current, self._used = self._arena, 0
        return parts

    def _reserve(self, length: int) -> memoryview:
        if self._used + length > len(self._current):
            if self._used:
                self._full.append(self._current[: self._used])
            self._current, self._used = memoryview(bytearray(max(length, _ARENA))), 0
        place = self._current[self._used : self._used + length]
        self._used += length
        return place

"""The condition of one file: whole, or how it is not.

The digest alone says whether a file is whole; everything else is a label that tells one loss from
another. Labels are made from what is there, as the expected content is not known:

- *partly-zeroed* is a file of the right length that differs and has an aligned block of zeroes.
  If its true content has such a block too, then the damage may lie elsewhere.
- Without the expected size, *short* is never said, and a file of zeroes counts as *zeroed*
  whatever its length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from enum import StrEnum

from nbdproxy.oracles.manifest import Entry

BLOCK = 4096
"""Bytes of a block that counts as zeroed; a file's last, shorter block counts too."""

_ZEROES = bytes(BLOCK)


class Condition(StrEnum):
    """What became of a file."""

    WHOLE = "whole"
    MISSING = "missing"
    EMPTY = "empty"
    ZEROED = "zeroed"
    PARTLY_ZEROED = "partly-zeroed"
    SHORT = "short"
    STALE = "stale"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"


def classify(
    expected: Entry, size: int, chunks: Iterable[bytes], earlier: Collection[str] = ()
) -> Condition:
    """Tell the condition of a file that has `size` bytes, read from `chunks` as far as needed.

    `earlier` holds the digests (hex) of versions that the file had before. A file that is empty
    and should not be is *empty*, even if an earlier version was empty as well.
    """
    wrong_size = expected.size is not None and size != expected.size
    if wrong_size and size and not earlier:
        return _by_size(expected, size)
    digest = hashlib.sha256()
    tally = _ZeroTally()
    for chunk in chunks:
        digest.update(chunk)
        tally.add(chunk)
    found = digest.hexdigest()
    if found == expected.sha256:
        return Condition.WHOLE
    if size == 0:
        return Condition.EMPTY
    if found in earlier:
        return Condition.STALE
    if wrong_size:
        return _by_size(expected, size)
    return tally.condition()


def _by_size(expected: Entry, size: int) -> Condition:
    assert expected.size is not None
    return Condition.SHORT if size < expected.size else Condition.DAMAGED


class _ZeroTally:
    """Looks for blocks of zeroes in a stream, whatever the size of its pieces."""

    def __init__(self) -> None:
        self._all_zero = True
        self._has_zero_block = False
        self._rest = b""

    def add(self, chunk: bytes) -> None:
        """Take the next piece of the stream."""
        data = self._rest + chunk if self._rest else chunk
        end = len(data) - len(data) % BLOCK
        for at in range(0, end, BLOCK):
            self._see(data[at : at + BLOCK])
        self._rest = data[end:]

    def condition(self) -> Condition:
        """Name, at the end of the stream, the damage of a file with the right length."""
        if self._rest:
            self._see(self._rest)  # the last, shorter block
        if self._all_zero:
            return Condition.ZEROED
        return Condition.PARTLY_ZEROED if self._has_zero_block else Condition.DAMAGED

    def _see(self, block: bytes) -> None:
        if block == _ZEROES[: len(block)]:
            self._has_zero_block = True
        else:
            self._all_zero = False

"""The condition of one file: whole, or how it is not.

The digest alone says whether a file is whole; everything else is a label that tells one loss from
another. Labels are made from what is there, as the expected content is not known:

- *partly-zeroed* is a file of the right length that differs and has an aligned block of zeroes.
  If its true content has such a block too, then the damage may lie elsewhere.
- *unreadable* is a file of a filesystem that is damaged there; *cannot-be-told* one of which nobody
  knows: what could tell cannot be read here, and that is no fault of the disk's.
- Without the expected size, *short* is never said, and a file of zeroes counts as *zeroed*
  whatever its length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum

from nbdproxy.oracles.manifest import SHA256, Entry, Manifest

BLOCK = 4096
"""Bytes of a block that counts as zeroed; a file's last, shorter block counts too."""

EARLIER = SHA256
"""The algorithm of earlier versions' digests, whatever a manifest has."""

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
    CANNOT_BE_TOLD = "cannot-be-told"


_PROGRAMS = {"blake2b": "b2sum"}
_WITH_CONTENT = {Condition.DAMAGED, Condition.PARTLY_ZEROED, Condition.STALE}


def classify(
    expected: Entry, size: int, chunks: Iterable[bytes], earlier: Collection[str] = ()
) -> Condition:
    """Tell the condition of a file that has `size` bytes, read from `chunks` as far as needed.

    `earlier` holds the SHA-256 digests (hex) of versions that the file had before. A file that is
    empty and should not be is *empty*, even if an earlier version was empty as well.
    """
    if expected.size not in {None, size} and size and not earlier:
        return _by_size(expected, size)
    algorithms = {*expected.algorithms, *([EARLIER] if earlier else [])}
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    zeroes = ZeroTally()
    for chunk in chunks:
        for one in hashes.values():
            one.update(chunk)
        zeroes.add(chunk)
    zeroes.end()
    return conclude(
        expected,
        size,
        {name: one.hexdigest() for name, one in hashes.items()},
        earlier,
        all_zero=zeroes.all_zero,
        zero_block=zeroes.zero_block,
    )


def conclude(
    expected: Entry,
    size: int,
    digests: Mapping[str, str],
    earlier: Collection[str],
    *,
    all_zero: bool,
    zero_block: bool,
) -> Condition:
    """Tell the condition of a file from its digests, and from what blocks of it are zeroes.

    `digests` has them by their algorithms: the expected ones' and, if there are earlier ones, those
    are EARLIER's. `zero_block` is whether any aligned block is, the last, shorter one included.
    """
    if any(digests[name] == expected.digest for name in expected.algorithms):
        return Condition.WHOLE
    if size == 0:
        return Condition.EMPTY
    if earlier and digests[EARLIER] in earlier:
        return Condition.STALE
    if expected.size not in {None, size}:
        return _by_size(expected, size)
    if all_zero:
        return Condition.ZEROED
    return Condition.PARTLY_ZEROED if zero_block else Condition.DAMAGED


def doubt_of(manifest: Manifest, states: Sequence[Callable[[str], Condition | None]]) -> str | None:
    """Say that a manifest may be another program's, if no file of it is whole in any state.

    That is said of lines that do not name their algorithm, where files with content are there.
    Each state tells the condition of a file by its path; None if it has no such file.
    """
    seen: set[Condition | None] = set()
    algorithms: dict[str, None] = {}
    for entry in manifest.entries:
        if entry.is_guessed:
            seen.update(state(entry.path) for state in states)
            algorithms.update(dict.fromkeys(entry.algorithms))
        if Condition.WHOLE in seen:
            return None
    if not seen & _WITH_CONTENT:
        return None
    programs = " or ".join(_PROGRAMS.get(name, f"{name}sum") for name in algorithms)
    return (
        f"no file has the digest that stands in the manifest: unless all of them are damaged, it "
        f"was made by another program than {programs}, such as b3sum; make it with `nbdproxy "
        f"manifest`, or with a program that names its algorithm (--tag)"
    )


def _by_size(expected: Entry, size: int) -> Condition:
    assert expected.size is not None
    return Condition.SHORT if size < expected.size else Condition.DAMAGED


class ZeroTally:
    """Looks for blocks of zeroes in a stream, whatever the size of its pieces."""

    def __init__(self) -> None:
        self.all_zero = True
        self.zero_block = False
        self._rest = b""

    def add(self, chunk: bytes) -> None:
        """Take the next piece of the stream."""
        data = self._rest + chunk if self._rest else chunk
        end = len(data) - len(data) % BLOCK
        for at in range(0, end, BLOCK):
            self._see(data[at : at + BLOCK])
        self._rest = data[end:]

    def end(self) -> None:
        """Take note that the stream is at its end: what is left is its last, shorter block."""
        if self._rest:
            self._see(self._rest)

    def _see(self, block: bytes) -> None:
        if block == _ZEROES[: len(block)]:
            self.zero_block = True
        else:
            self.all_zero = False

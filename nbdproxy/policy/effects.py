"""What a faulty disk shows: the bytes that reads get in place of those that were written.

Pure functions; the image keeps the honest bytes (see `nbdproxy.disks.faults`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

from nbdproxy.dice import DrawKey, draw_below
from nbdproxy.policy.actions import Action, ActionKind, Keep

SECTOR = 512
"""Bytes that are written, or not, as one (PERSISTENCE.md, rule 7)."""

_BITS = 8 * SECTOR

ShownBytes = tuple[int, bytes]
"""An offset on the disk, and what reads get from there on."""


def shown_after_write(
    action: Action, draw_key: DrawKey, offset: int, data: bytes, old: bytes
) -> list[ShownBytes]:
    """Return what reads show after a write that a rule matched.

    `old` is what they showed there before, as long as `data`. Places may lie outside the disk.
    """
    match action.kind:
        case ActionKind.LOSE:
            return [(offset, old)]
        case ActionKind.MISDIRECT:
            return [(offset, old), (offset + action.shift, data)]
        case ActionKind.CORRUPT:
            return [(offset, flipped(data, action.bits, draw_key))]
        case ActionKind.TEAR:
            pieces = _in_sectors(offset, len(data))
            written = _written(action, draw_key, len(pieces))
            return [
                (start, old[start - offset : end - offset])
                for index, (start, end) in enumerate(pieces)
                if index not in written
            ]
    raise AssertionError(action.kind)


def _in_sectors(offset: int, length: int) -> list[tuple[int, int]]:
    """Return [offset, offset + length) cut where sectors of the disk begin."""
    end = offset + length
    cuts = range(offset // SECTOR * SECTOR + SECTOR, end, SECTOR)
    return list(itertools.pairwise([offset, *cuts, end]))


def flipped(data: bytes, bits: int, draw_key: DrawKey) -> bytes:
    """Return `data` with so many of its bits flipped, as drawn; all of them if it has fewer."""
    found = bytearray(data)
    for bit in _some(bits, 8 * len(data), partial(draw_key.draw_below, 8 * len(data), "bit")):
        found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


def _some(count: int, limit: int, draw: Callable[[int], int]) -> set[int]:
    """Return so many of the numbers below `limit`, or all of them, by draws for turn 0, 1, ..."""
    few = min(count, limit - min(count, limit))  # it is quicker to draw those left out
    chosen: set[int] = set()
    turns = itertools.count()
    while len(chosen) < few:
        chosen.add(draw(next(turns)))
    return chosen if few == count else set(range(limit)) - chosen


def stuck(data: bytes, offset: int, action: Action, draw_key: DrawKey) -> bytes:
    """Return `data`, read from `offset`, as it is if some bits of each sector are stuck."""
    found = bytearray(data)
    for sector in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
        draw = partial(draw_below, _BITS, draw_key.seed, draw_key.rule, "stuck", sector)
        for bit in _some(action.bits, _BITS, draw):
            at = sector * SECTOR + bit // 8 - offset
            if 0 <= at < len(found):
                mask = 1 << bit % 8
                found[at] = found[at] | mask if action.value else found[at] & ~mask
    return bytes(found)


def _written(action: Action, draw_key: DrawKey, count: int) -> frozenset[int]:
    """Return which of a torn write's sectors are written.

    If it is drawn, that is at least one and not all of them; of a single one none.
    """
    ranked = list(range(count))
    if action.keep is Keep.BACK:
        ranked.reverse()
    elif action.keep is Keep.RANDOM:
        ranked.sort(key=lambda index: draw_key.draw("sector", index))
    if action.sectors is not None:
        return frozenset(ranked[: action.sectors])
    return frozenset(ranked[: 1 + draw_key.draw_below(count - 1, "sectors") if count > 1 else 0])

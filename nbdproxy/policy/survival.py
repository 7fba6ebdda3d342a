"""What of a volatile cache is on the image after a cut: pieces of the held writes, as drawn.

All choices are legal crash states (PERSISTENCE.md, rules 5 to 7): any held write may have landed or
not, each sector for itself. Pure: the writes go in as (offset, length), in the order received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nbdproxy.dice import DrawKey
from nbdproxy.extents import Extent, ExtentSet, join_neighbours
from nbdproxy.policy.effects import SECTOR
from nbdproxy.policy.model import Survivors


class SurvivingPiece(NamedTuple):
    """The bytes [start, end) of the disk, of the write at index `write`, that are on the image."""

    write: int
    start: int
    end: int


def surviving(
    survivors: Survivors,
    writes: Sequence[Extent],
    seed: int,
    metadata: ExtentSet,
) -> list[SurvivingPiece]:
    """Return what survives, in the order received. `metadata` matters for two kinds only."""
    whole = [SurvivingPiece(i, write.offset, write.end) for i, write in enumerate(writes)]
    draw_key = DrawKey(seed, "survivors", 0)
    found: list[SurvivingPiece] = []
    match survivors:
        case Survivors.FLUSHED:
            pass
        case Survivors.ALL:
            found = whole
        case Survivors.PREFIX:
            found = whole[: draw_key.draw_below(len(whole) + 1, "prefix")]
        case Survivors.RANDOM:
            found = [piece for piece in whole if draw_key.draw(piece.write) < 0.5]
        case Survivors.ALL_BUT_ONE:
            gone = draw_key.draw_below(max(1, len(whole)), "gone")
            found = [piece for piece in whole if piece.write != gone]
        case Survivors.TORN:
            found = [piece for one in whole for piece in _torn(one, draw_key)]
        case Survivors.METADATA | Survivors.DATA:
            wanted = survivors is Survivors.METADATA
            parts = metadata.overlapping if wanted else metadata.missing
            found = [
                SurvivingPiece(one.write, part.offset, part.end)
                for one in whole
                for part in parts(one.start, one.end)
                if part.length
            ]
    return found


def _torn(piece: SurvivingPiece, draw_key: DrawKey) -> list[SurvivingPiece]:
    sectors = (
        Extent.between(max(piece.start, sector * SECTOR), min(piece.end, (sector + 1) * SECTOR))
        for sector in range(piece.start // SECTOR, -(-piece.end // SECTOR))
        if draw_key.draw(piece.write, sector) < 0.5
    )
    return [
        SurvivingPiece(piece.write, part.offset, part.end)
        for part in join_neighbours(sectors, Extent.joined)
    ]

"""What a state lacks of one file, byte range by byte range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nbdproxy.crash.blame.ranges import FileRange, Losses, MissingPiece
from nbdproxy.printable import printable

SHOWN = 5
"""Ranges, and metadata that leads to them, that the text lists; --json has all."""


def lines(losses: Losses) -> Iterator[str]:
    """Yield lines of text that say what was lost."""
    yield f"  what state {losses.reference}, which has it whole, has more:"
    parts = [*_data(losses), *(f"{printable(piece.what)}: {_who(piece)}" for piece in losses.way)]
    for part in parts[:SHOWN]:
        yield f"    {part}"
    if len(parts) > SHOWN:
        yield f"    and {len(parts) - SHOWN:,} more; --json lists them"


def to_json(losses: Losses) -> dict[str, object]:
    """Return all that was lost, as `nbdproxy explain --json` prints it."""
    return {
        "reference": str(losses.reference),
        "ranges": [
            {
                "start": one.start,
                "end": one.end,
                "cause": "data" if one.data else None if one.is_whole else "metadata",
                **(_piece(one.data) if one.data else {}),
            }
            for one in losses.ranges
        ],
        "metadata": [{"what": piece.what, **_piece(piece)} for piece in losses.way],
    }


def _data(losses: Losses) -> Iterator[str]:
    """Yield a line for each run of bytes that was lost, or kept, for the same reason."""
    merged: list[FileRange] = []
    for one in losses.ranges:
        last = merged[-1] if merged else None
        if last is not None and _key(last) == _key(one):
            merged[-1] = replace(last, end=one.end)
        else:
            merged.append(one)
    for one in merged:
        bytes_ = f"bytes {one.start:,} to {one.end - 1:,}"
        if one.data is not None:
            yield f"{bytes_}: {_who(one.data)}"
        elif not one.is_whole:
            if one.is_apart:
                yield f"{bytes_}: the data is there, and what leads to it is not:"
            else:
                yield f"{bytes_}: packed into metadata or compressed, of which is lacking:"


def _key(one: FileRange) -> tuple[int | None, bool, bool]:
    return None if one.data is None else one.data.seq, one.is_whole, one.is_apart


def _who(piece: MissingPiece) -> str:
    return f"request {piece.seq} at {piece.received_ns / 1e9:.3f} s; {piece.blame.sentence()}"


def _piece(piece: MissingPiece) -> dict[str, object]:
    return {
        "request": piece.seq,
        "received_s": piece.received_ns / 1e9,
        "offset": piece.extent.offset,
        "length": piece.extent.length,
        "safety": piece.blame.safety.value,
        "flush": piece.blame.flush,
    }

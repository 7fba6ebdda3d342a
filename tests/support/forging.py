"""Recordings made in bad faith: any slots, with right checksums and digests."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from xxhash import xxh3_64_intdigest

SLOT = struct.Struct("<BBHIQQQQQQ")
FIELDS = ["kind", "command", "flags", "connection", "time", "offset", "length", "cookie"]
FIELDS += ["position", "digest"]
NONE = 2**64 - 1
META, COMPLETED = 1, 3


def slots_of(run: Path) -> list[list[int]]:
    """The fields of each slot of a recording that has no tail."""
    events = (run / "events").read_bytes()
    return [list(SLOT.unpack_from(events, at)) for at in range(0, len(events), 64)]


def sealed(slots: Iterable[Sequence[int]], data: bytes, *, digests: bool = True) -> bytes:
    """The events with these fields, with checksums; with `digests`, those of payloads too."""
    events = []
    for seq, slot in enumerate(slots):
        fields = list(slot)
        kind, length, position = fields[0], fields[6], fields[8]
        if digests and kind != COMPLETED and position + length <= len(data):
            fields[9] = xxh3_64_intdigest(data[position : position + length])
        body = SLOT.pack(*fields)
        events.append(body + struct.pack("<Q", xxh3_64_intdigest(body, seq)))
    return b"".join(events)


def forge(run: Path, changes: Iterable[tuple[int, str, int]], data: bytes | None = None) -> None:
    """Change fields of a recording's slots where it is, and perhaps its data."""
    slots = slots_of(run)
    for slot, field, value in changes:
        slots[slot][FIELDS.index(field)] = value
    content = (run / "data").read_bytes() if data is None else data
    (run / "events").write_bytes(sealed(slots, content))
    (run / "data").write_bytes(content)


def retell(run: Path, seq: int, text: bytes) -> None:
    """Let the event `seq`, which has a text, say something else."""
    data = (run / "data").read_bytes()
    forge(run, [(seq, "position", len(data)), (seq, "length", len(text))], data + text)

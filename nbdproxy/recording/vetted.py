"""A recording from somebody else: its slots are checked for what no recorder writes.

Checksums tell damage from what was written, not what was written in bad faith; a slot that answers
2^40 requests, say, would take all memory before anything else is noticed. Every way in goes through
here, because `reader.Recording` does, and everything behind it relies on what is checked:

- kinds and commands are known; META is the first event and no other; what has a payload may
- all payloads together are no more than the data stream holds
- what is answered came before, and no more is answered than came
- a request is inside the disk; times and numbers of bytes do not leave what a signed number holds

Not covered: what requests and notes say; a recording can tell of a disk that never was.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbdproxy.errors import RecordingError
from nbdproxy.recording.format import NONE, SlotKind
from nbdproxy.requests import Command

Slots = NDArray[np.void]

_COMMANDS = (Command.WRITE, Command.TRIM, Command.FLUSH, Command.WRITE_ZEROES)
"""What is recorded; the rest changes nothing."""
_HIGH = 62
"""Numbers have no bits from here on: then the sum of two is a signed number, too."""
_PAYLOAD = (SlotKind.COMPLETED, SlotKind.REFUSED)
"""They have none. Of requests, only writes have one."""


def _known(numbers: tuple[int, ...]) -> NDArray[np.bool_]:
    known = np.zeros(256, np.bool_)
    known[list(numbers)] = True
    return known


_IS_KIND = _known(tuple(map(int, SlotKind)))
_IS_COMMAND = _known(tuple(map(int, _COMMANDS)))
_IS_BARE = _known(tuple(map(int, _PAYLOAD)))


class Vetting:
    """Checks the slots of the recording at `path`, chunk by chunk, before they are used.

    `room` is how many bytes of payload there are.
    """

    def __init__(self, path: Path, room: int) -> None:
        self._path = path
        self._room = room
        self._answered = 0
        self._payload = 0.0

    def check(self, slots: Slots, number: int, size: int) -> None:
        """Check slots of a disk of `size` bytes, the first of which is event `number`.

        Raises RecordingError if one of them is such as no recorder writes.
        """
        if not (self._known(slots, number) and self._answers(slots, number)) or not (
            self._places(slots, size) and self._payloads(slots)
        ):
            raise impossible(self._path, number)

    def _known(self, slots: Slots, number: int) -> bool:
        kinds = slots["kind"]
        asked = kinds == SlotKind.RECEIVED
        first = np.flatnonzero(kinds == SlotKind.META).tolist()
        return (
            bool(_IS_KIND[kinds].all())
            and first == ([0] if number == 0 else [])
            and bool(_IS_COMMAND[slots["command"][asked]].all())
            and not (slots["time"] >> _HIGH).any()
        )

    def _answers(self, slots: Slots, number: int) -> bool:
        """An answer is to what came before, and no more is answered than came."""
        rows = np.flatnonzero(slots["kind"] == SlotKind.COMPLETED)
        seqs = (rows + number).astype(np.uint64)
        offset, length = slots["offset"][rows], slots["length"][rows]
        if not ((offset <= seqs).all() and (length <= seqs - offset).all()):
            return False
        self._answered += int(length.sum())
        return self._answered <= number + len(slots)

    def _places(self, slots: Slots, size: int) -> bool:
        kinds, offset, length = slots["kind"], slots["offset"], slots["length"]
        asked = kinds == SlotKind.RECEIVED
        flush = asked & (slots["command"] == Command.FLUSH)
        of_disk = (asked & ~flush) | (kinds == SlotKind.BEFORE)
        room = np.uint64(size)
        within = (offset <= room) & (length <= room - np.minimum(offset, room))
        return bool(within[of_disk].all()) and not ((offset | length)[flush] >> _HIGH).any()

    def _payloads(self, slots: Slots) -> bool:
        """All payloads together are in the data stream, so one is not read a million times."""
        kinds, there = slots["kind"], slots["position"] != NONE
        writes = (kinds == SlotKind.RECEIVED) & (slots["command"] == Command.WRITE)
        bare = _IS_BARE[kinds] | ((kinds == SlotKind.RECEIVED) & ~writes)
        # Each is in the stream already; as a float a sum does not run over.
        self._payload += float(slots["length"][there].sum(dtype=np.float64))
        return (
            not (bare & there).any()
            and not (writes & ~there & (slots["length"] != 0)).any()
            and self._payload <= self._room
        )


def impossible(path: Path, number: int) -> RecordingError:
    """Return what is said of a recording with something impossible from event `number` on."""
    return RecordingError(
        f"{path} has something at or behind event {number} that no recorder writes; do not use it"
    )

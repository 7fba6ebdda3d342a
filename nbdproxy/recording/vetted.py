"""A recording from somebody else: its slots are checked for what no recorder writes.

Checksums tell damage from what was written, not what was written in bad faith; a slot that answers
2^40 requests, say, would take all memory before anything else is noticed.

Not covered: what requests and notes say; a recording can tell of a disk that never was.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbdproxy.errors import RecordingError
from nbdproxy.recording.format import NONE, SLOT_SIZE, Kind
from nbdproxy.recording.notes import NOTE_OF_SLOT
from nbdproxy.recording.reader import SLOTS, Recording
from nbdproxy.requests import Command

TEXT_MAX = 256 * 1024 * 1024
"""Bytes of a text; META's, the longest, takes 20 for each part of an image that is no hole."""
_KINDS = [int(kind) for kind in Kind]
_COMMANDS = [int(command) for command in Command]
_TEXTS = [int(Kind.META), *map(int, NOTE_OF_SLOT)]


class VettedRecording(Recording):
    """A recording whose slots are such as a recorder writes; raises RecordingError if not."""

    def __init__(self, path: Path) -> None:
        self._answered = 0
        try:
            super().__init__(path)
            facts = self.meta
            numbers = [facts.size, *(number for part in facts.data for number in part)]
            texts = [facts.image, facts.started, facts.program, facts.kind, *facts.policies]
            fine = all(type(text) is str for text in texts) and all(
                type(number) is int and 0 <= number < 2**63 for number in numbers
            )
        except RecursionError:
            fine = False
        if not fine:
            self.close()
            raise _impossible(path, 0)

    def _good(self, slots: memoryview, number: int) -> int:
        whole = np.frombuffer(slots[: len(slots) // SLOT_SIZE * SLOT_SIZE], SLOTS)
        # Before their texts are read; a long one that is only damage ends the recording.
        long = np.isin(whole["kind"], _TEXTS) & (whole["position"] != NONE)
        stops = np.flatnonzero(long & (whole["length"] > TEXT_MAX))
        first = int(stops[0]) if len(stops) else len(whole)
        good = super()._good(slots[: first * SLOT_SIZE], number)
        if not self._possible(whole[:good], number):
            raise _impossible(self.path, number)
        return good

    def _possible(self, slots: NDArray[np.void], number: int) -> bool:
        """Tell whether slots, the first of which is event `number`, can come from a recorder."""
        kinds, seqs = slots["kind"], np.arange(number, number + len(slots), dtype=np.uint64)
        offset, length = slots["offset"], slots["length"]
        done, asked = kinds == Kind.COMPLETED, kinds == Kind.RECEIVED
        self._answered += sum(length[done].tolist())
        of_disk = (asked & (slots["command"] != Command.FLUSH)) | (kinds == Kind.BEFORE)
        return (
            bool(np.isin(kinds, _KINDS).all())
            and np.array_equal(kinds == Kind.META, seqs == 0)
            and NONE not in slots["position"][kinds == Kind.META]
            and bool(np.isin(slots["command"][asked], _COMMANDS).all())
            # An answer is to what came before, and nothing is answered twice.
            and bool((offset[done] <= seqs[done]).all())
            and bool((length[done] <= seqs[done] - offset[done]).all())
            and self._answered <= number + len(slots)
            and not (offset[of_disk] >> 62).any()
            and not (length[of_disk] >> 62).any()
        )


def _impossible(path: Path, number: int) -> RecordingError:
    return RecordingError(
        f"{path} has something at or behind event {number} that no recorder writes; do not use it"
    )

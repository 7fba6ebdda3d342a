"""The data of a recording's WRITEs, read in long pieces and checked before it is used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from nbdproxy.errors import RecordingError
from nbdproxy.recording.format import SLOT_SIZE, SLOTS, data_path, events_path
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.stream import StreamReader

_PIECE = 4 << 20
_SLOTS = 16384


class Payloads:
    """The payloads of a recording; those of requests that follow each other cost least.

    Eight bytes a request.
    """

    def __init__(self, recording: Recording) -> None:
        self._path = recording.path
        self._seq = recording.table.seq
        self._digest = _digests(recording)
        self._data = StreamReader(data_path(recording.path))
        self._piece = memoryview(b"")
        self._start = 0

    def of(self, row: int, position: int, length: int) -> memoryview:
        """Return the data of the request in a row, which is at a position of the data stream.

        Raises RecordingError if it is damaged.
        """
        begin = position - self._start
        if begin < 0 or begin + length > len(self._piece):
            self._piece = memoryview(bytearray(max(length, _PIECE)))
            self._piece = self._piece[: self._data.read_into(position, self._piece)]
            self._start, begin = position, 0
        found = self._piece[begin : begin + length]
        if xxh3_64_intdigest(found) != self._digest[row]:
            raise RecordingError(
                f"the payload of event {self._seq[row]} in {self._path} is damaged; copy the "
                "recording again, all its files"
            )
        return found

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._data.close()


def _digests(recording: Recording) -> NDArray[np.uint64]:
    """Return the digest of each request's payload."""
    events = StreamReader(events_path(recording.path))
    try:
        found = []
        seq = recording.table.seq
        buffer = memoryview(bytearray(_SLOTS * SLOT_SIZE))
        for first in range(0, recording.events, _SLOTS):
            count = events.read_into(first * SLOT_SIZE, buffer) // SLOT_SIZE
            slots = np.frombuffer(buffer[: count * SLOT_SIZE], SLOTS)
            low, high = np.searchsorted(seq, (first, first + count))
            found.append(slots["digest"][seq[low:high] - first])
        return np.concatenate(found)
    finally:
        events.close()

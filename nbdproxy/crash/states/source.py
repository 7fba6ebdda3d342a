"""What crash states need of a recording; the recording's reader satisfies it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.recording.index import RequestTable
from nbdproxy.recording.notes import Note


class Source(Protocol):
    """A recording, opened to be read."""

    @property
    def table(self) -> RequestTable:
        """The requests."""
        ...

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        ...

    @property
    def events(self) -> int:
        """How many events there are: the position of `end`."""
        ...

    @property
    def notes(self) -> Sequence[Note]:
        """The notes, in seq order."""
        ...

    @property
    def offers_fua(self) -> bool | None:
        """Whether a client could send FUA; None if that is not known."""
        ...

    @property
    def above_qcow2(self) -> bool:
        """Whether the disk is what a guest sees of a qcow2 file, whose driver is below."""
        ...

    def base(self) -> ReadableDevice:
        """Open the disk as it was before the first request; who asks for it closes it."""
        ...

    def read_payload(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` with a WRITE's data from `position` of the data stream."""
        ...

    def time_of(self, seq: int) -> int:
        """Return when an event happened, in nanoseconds since the recording's start."""
        ...

    def position_at(self, time_ns: int) -> int:
        """Return the cut at an instant: the number of events that happened at or before it."""
        ...

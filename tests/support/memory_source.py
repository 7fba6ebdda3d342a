"""`MemorySource` is a recording made up in memory: small examples for the tests of crash states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.recording.index import RequestTable
from nbdproxy.recording.notes import Note


@dataclass(frozen=True, slots=True, eq=False)
class MemorySource:
    """A made-up recording; its events are one millisecond apart, the first at 0."""

    table: RequestTable
    size: int
    events: int
    open_base: Callable[[], ReadableDevice]
    payload: bytes = b""
    notes: Sequence[Note] = field(default_factory=tuple)
    offers_fua: bool | None = True
    above_qcow2: bool = False

    def base(self) -> ReadableDevice:
        """Open the disk as it was before the first request."""
        return self.open_base()

    def read_payload(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` from `position` of the payload."""
        buffer[:] = self.payload[position : position + len(buffer)]

    def time_of(self, seq: int) -> int:
        """Return the event's instant in nanoseconds."""
        return seq * 1_000_000

    def position_at(self, time_ns: int) -> int:
        """Return the number of events up to an instant."""
        return max(0, min(self.events, time_ns // 1_000_000 + 1))

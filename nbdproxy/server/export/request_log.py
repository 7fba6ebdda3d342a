"""What an export writes down, and whether it may go on.

Guarantees: nothing succeeds unrecorded; where that is wanted, no flush or FUA write does before the
recording of it is durable. Once the recording cannot grow, or the server below is
gone, `failure` is set for good.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import trio

from nbdproxy.errors import NbdproxyError, RecordingError
from nbdproxy.nbd.events import Refused
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Request
from nbdproxy.server.below.failures import LOST, NOT_RECORDED, RequestFailure
from nbdproxy.server.below.syncer import Syncer

log = structlog.get_logger()


class RequestLog:
    """The log of an export that is not recorded: it numbers the requests that change something."""

    records = False
    """Whether there is a recording."""
    durable = False
    """Whether the recording has to be durable up to each flush that is answered."""

    def __init__(self) -> None:
        self.failed = trio.Event()
        self.failure: NbdproxyError | None = None
        self._seq = 0

    @property
    def full(self) -> bool:
        """Whether it is the recording that failed."""
        return isinstance(self.failure, RecordingError)

    def fail(self, error: NbdproxyError) -> None:
        """Stop for good: the recording is full, or the server below is gone."""
        if self.failure is None:
            log.error("the export stops", reason=str(error))
            self.failure = error
            self.failed.set()

    async def make_room(self, size: int) -> None:
        """Wait until `size` bytes of payloads can be recorded without blocking."""

    def received(
        self,
        _connection: int,
        _requests: Sequence[Request | Refused],
        changing: Sequence[Request],
        /,
    ) -> int:
        """Record a batch; return the seq of its first request that changes something."""
        self._seq += len(changing)
        return self._seq - len(changing)

    def completed(self, _connection: int, _first: int, _count: int, _error: int, /) -> bool:
        """Record that requests are answered; False if that cannot be recorded."""
        return True

    def outcome(
        self, connection: int, seq: int, failure: RequestFailure | None
    ) -> RequestFailure | None:
        """Record how a request that had to wait ended; return what the client is told."""
        error = failure.error if failure is not None else 0
        if self.full or not self.completed(connection, seq, 1, error):
            return NOT_RECORDED
        return failure

    async def keep(self) -> RequestFailure | None:
        """Make durable what was recorded, if that is wanted; return what the client is told."""
        return None

    def note(self, kind: NoteKind, text: str = "", *, connection: int = 0) -> None:
        """Put an event that is not a request into the recording, if there is one."""


class RecordingLog(RequestLog):
    """The log of an export that is recorded by `recorder`, which the caller closes."""

    records = True

    def __init__(self, recorder: RecordingWriter) -> None:
        super().__init__()
        self.durable = recorder.durable
        self._recorder = recorder
        # A thread of its own: it must not wait for those that wait for another server.
        self._syncing = trio.CapacityLimiter(1)
        self._syncer = Syncer(self._sync)

    async def _sync(self) -> None:
        await trio.to_thread.run_sync(self._recorder.sync, limiter=self._syncing)

    async def make_room(self, size: int) -> None:
        """Wait until `size` bytes of payloads can be recorded without blocking."""
        if not self._recorder.has_room(size):
            await trio.to_thread.run_sync(self._recorder.wait_for_room, size)

    def received(
        self,
        connection: int,
        requests: Sequence[Request | Refused],
        changing: Sequence[Request],
        /,
    ) -> int:
        """Record a batch; return the seq of its first request that changes something."""
        if self.failure is not None:
            return super().received(connection, requests, changing)
        try:
            if len(changing) < len(requests):
                for refused in requests:
                    if type(refused) is Refused:
                        self._recorder.refused(connection, refused.request, refused.error)
            return self._recorder.received(connection, changing) if changing else 0
        except RecordingError as error:
            self.fail(error)
            return 0

    def completed(self, connection: int, first: int, count: int, error: int, /) -> bool:
        """Record that requests are answered; False if that cannot be recorded."""
        if not count:
            return True
        try:
            self._recorder.completed(connection, first, count, error)
        except RecordingError as full:
            self.fail(full)
            return False
        return True

    async def keep(self) -> RequestFailure | None:
        """Make durable what was recorded, if that is wanted; return what the client is told."""
        if not self.durable:
            return None
        try:
            if self.failure is None:
                await self._syncer.sync()
        except RecordingError as error:
            self.fail(error)
        return None if self.failure is None else NOT_RECORDED if self.full else LOST

    def note(self, kind: NoteKind, text: str = "", *, connection: int = 0) -> None:
        """Put an event that is not a request into the recording."""
        if not self.full:
            try:
                self._recorder.note(kind, text, connection=connection)
            except RecordingError as error:
                self.fail(error)

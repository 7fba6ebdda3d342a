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
from nbdproxy.server.export.jobs import LOST, NOT_RECORDED, RequestFailure
from nbdproxy.server.export.syncer import Syncer

log = structlog.get_logger()


class RequestLog:
    """The recording of one export, if there is one, and its failure, if there was one."""

    def __init__(self, recorder: RecordingWriter | None) -> None:
        self.recorder = recorder
        self.failed = trio.Event()
        self.failure: NbdproxyError | None = None
        self._seq = 0
        # A thread of its own: it must not wait for those that wait for another server.
        self._syncing = trio.CapacityLimiter(1)
        self._syncer = Syncer(self._sync)

    @property
    def durable(self) -> bool:
        """Whether the recording has to be durable up to each flush that is answered."""
        return self.recorder is not None and self.recorder.durable

    async def _sync(self) -> None:
        assert self.recorder is not None
        await trio.to_thread.run_sync(self.recorder.sync, limiter=self._syncing)

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

    def received(
        self,
        connection: int,
        requests: Sequence[Request | Refused],
        changing: Sequence[Request],
    ) -> int:
        """Record a batch; return the seq of its first request that changes something."""
        if self.recorder is None or self.failure is not None:
            self._seq += len(changing)
            return self._seq - len(changing)
        try:
            if len(changing) < len(requests):
                for refused in requests:
                    if type(refused) is Refused:
                        self.recorder.refused(connection, refused.request, refused.error)
            return self.recorder.received(connection, changing) if changing else 0
        except RecordingError as error:
            self.fail(error)
            return 0

    def completed(self, connection: int, first: int, count: int, error: int) -> bool:
        """Record that requests are answered; False if that cannot be recorded."""
        if self.recorder is None or not count:
            return True
        try:
            self.recorder.completed(connection, first, count, error)
        except RecordingError as full:
            self.fail(full)
            return False
        return True

    def outcome(
        self, connection: int, seq: int, failure: RequestFailure | None
    ) -> RequestFailure | None:
        """Record how a request that had to wait ended; return what the client is told."""
        error = failure.error if failure is not None else 0
        if self.full or not self.completed(connection, seq, 1, error):
            return NOT_RECORDED
        return failure

    def note(self, kind: NoteKind, text: str = "", *, connection: int = 0) -> None:
        """Put an event that is not a request into the recording, if there is one."""
        if self.recorder is not None and not self.full:
            try:
                self.recorder.note(kind, text, connection=connection)
            except RecordingError as error:
                self.fail(error)

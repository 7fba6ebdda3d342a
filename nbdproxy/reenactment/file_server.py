"""The server's end below the format driver: a file is read and written, and that is recorded.

The same protocol core and recorder as `serve` has, without an event loop: whoever plays the guest
polls this end, too, so that what the driver answers and what it has written before are seen in one
order, by one thread. That order is what a recording promises: all that was read together is
received before any of it is completed, and it is completed before the answers leave.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from nbdproxy.nbd.codec import greeting
from nbdproxy.nbd.constants import TransmissionFlag
from nbdproxy.nbd.events import Opened, Refused, Send, ServerEvent
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from nbdproxy.nbd.replies import Replies
from nbdproxy.nbd.server import Phase, ServerConnection
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.reenactment.scratch_copy import ScratchCopy
from nbdproxy.requests import MODIFYING, Command, Request

SECTOR = 512
"""Bytes that each request is a multiple of, as on a file that is opened with O_DIRECT."""

_BUFFER = 1 << 20
_CONNECTION = 1

# Plain integers: operators of IntEnum are slow, and these are in the hot path.
_READ, _WRITE, _FLUSH = int(Command.READ), int(Command.WRITE), int(Command.FLUSH)
_STATUS = int(Command.BLOCK_STATUS)
_RECORDED = frozenset({*(int(command) for command in MODIFYING), _FLUSH})


class FileServer:
    """Serves `disk` to the one client at the other end of `sock`. Owns neither of them.

    Without `flushes` it offers neither FLUSH nor FUA, as a file does that QEMU has opened with
    `cache.no-flush`.
    """

    def __init__(
        self, sock: socket.socket, disk: ScratchCopy, recorder: RecordingWriter, *, flushes: bool
    ) -> None:
        flags = WRITABLE
        if not flushes:
            flags &= ~(TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA)
        info = ExportInfo("", disk.size, flags, min_block=SECTOR)
        self.sock = sock
        self.is_open = True
        """Whether the client may still send something."""
        self._disk = disk
        self._recorder = recorder
        self._connection = ServerConnection({"": info})
        self._replies = Replies(arena=0)
        self._buffer = memoryview(bytearray(_BUFFER))
        self._filled = 0
        sock.sendall(greeting())

    @property
    def position(self) -> int:
        """The position in the recording that the next event will have."""
        return self._recorder.seq

    def serve(self) -> None:
        """Read what has arrived, do it, and answer; blocks only where nothing has arrived.

        Raises ProtocolError if the client breaks the protocol, OSError if the disk fails.
        """
        count = self.sock.recv_into(self._buffer[self._filled :])
        self.is_open = count > 0
        self._filled += count
        data, at = self._buffer[: self._filled], 0
        connection = self._connection
        while self.is_open:
            used, events = connection.receive(data[at:])
            at += used
            self._act(events)
            if connection.breach is not None:
                raise connection.breach
            self.is_open = connection.phase is not Phase.CLOSED
            if not used or len(data) - at < connection.needed:
                break
        self._keep(data[at:])

    def _keep(self, rest: memoryview) -> None:
        """Move what is left over to the front of a buffer with room for the next request."""
        wanted = max(_BUFFER, self._connection.needed)
        if len(self._buffer) != wanted:
            self._buffer = memoryview(bytearray(wanted))
        self._buffer[: len(rest)] = rest
        self._filled = len(rest)

    def _act(self, events: Sequence[ServerEvent]) -> None:
        requests: list[Request] = []
        for event in events:
            if type(event) is Request:
                requests.append(event)
            elif type(event) is Send:
                self.sock.sendall(event.data)
            elif type(event) is Refused:
                self._replies.fail(*event)
            elif type(event) is Opened:
                assert self._connection.terms is not None
                self._replies = Replies(self._connection.terms.style)
        if requests:
            self._batch(requests)
        for part in self._replies.take():
            self.sock.sendall(part)

    def _batch(self, requests: Sequence[Request]) -> None:
        changes = [one for one in requests if one.command in _RECORDED]
        if changes:
            first = self._recorder.received(_CONNECTION, changes)
        for request in requests:
            self._do(request)
        if changes:
            self._recorder.completed(_CONNECTION, first, len(changes), 0)

    def _do(self, request: Request) -> None:
        command, offset = request.command, request.offset
        if command == _READ:
            self._disk.pread_into(offset, self._replies.reserve_read(request))
            self._replies.finish_read(request)
            return
        if command == _STATUS:
            # Holes make a driver's reads cheaper, and that is all it would use them for.
            self._replies.status(request, [(request.length, 0)])
            return
        if command == _WRITE:
            self._disk.pwrite(offset, request.payload)
        elif command in _RECORDED and command != _FLUSH:
            self._disk.zero(offset, request.length)
        self._replies.done(request)

"""Accepts clients, at most `MAX_CLIENTS` at once, and runs their sessions.

Where there are fewer descriptors (`ulimit -n`) there are fewer places: some are left for all else.

Who has not opened an export yet holds no place against somebody new: when all are taken, the one
that has been negotiating the longest goes. So idle connections never keep a real client out.
"""

from __future__ import annotations

import os
import resource
import socket

import structlog
import trio

from nbdproxy.recording.notes import NoteKind
from nbdproxy.server.front.control import CLIENTS
from nbdproxy.server.front.endpoints import Endpoint
from nbdproxy.server.front.export_provider import ExportProvider
from nbdproxy.server.front.session import Session
from nbdproxy.server.shared.power import Power
from nbdproxy.server.shared.tls import ServerTls

log = structlog.get_logger()

MAX_CLIENTS = 100
"""Clients at once; QEMU takes one connection, nbdcopy and the kernel a few each."""

_RESERVED = CLIENTS + 16
"""Descriptors left to the control socket, and to what is opened meanwhile."""

_PAUSE_S = 0.1
_NOTE_S = 1.0


class Listener:
    """The listening end of a service: accepts clients and runs their sessions."""

    def __init__(
        self, exports: ExportProvider, endpoint: Endpoint, tls: ServerTls, power: Power
    ) -> None:
        self._exports = exports
        self._endpoint = endpoint
        self._tls = tls
        self._power = power
        self._places = _places()
        # In the order in which they came.
        self._sessions: dict[Session, None] = {}
        self._connections = 0
        self._shut = False
        self._noted = -_NOTE_S
        self._accepting = trio.CancelScope()
        self._clients = trio.CancelScope()

    async def run(self) -> None:
        """Serve clients until `shut` is called and the last of them has left."""
        with self._clients:
            async with trio.open_nursery() as sessions:
                with self._accepting:
                    await self._accept(sessions)
                self._endpoint.close()

    def shut(self) -> None:
        """Let no one in any more."""
        self._shut = True
        self._accepting.cancel()

    def throw_out(self) -> None:
        """Drop all clients at once."""
        for session in self._sessions:
            session.cut_off()

    def wind_up(self, grace_s: float) -> None:
        """Let the clients have their answers, for so many seconds, and end."""
        for session in self._sessions:
            session.stop_reading()
        self._clients.deadline = trio.current_time() + grace_s

    async def _accept(self, sessions: trio.Nursery) -> None:
        listening = self._endpoint.sock
        while True:
            await trio.lowlevel.wait_readable(listening)
            try:
                sock, _ = listening.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                # Out of descriptors, most likely: let some sessions end first.
                log.warning("cannot accept a client", reason=error.strerror)
                self._make_room()
                await trio.sleep(_PAUSE_S)
                continue
            self._welcome(sock, sessions)

    def _welcome(self, sock: socket.socket, sessions: trio.Nursery) -> None:
        if self._power.off or self._shut:
            sock.close()
            return
        sock.setblocking(False)
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = self._endpoint.client(sock)
        except OSError:  # gone already
            sock.close()
            return
        if len(self._sessions) >= self._places and not self._make_room():
            self._turn_away(sock, client)
            return
        self._connections += 1
        session = Session(
            sock, self._connections, client, self._exports, power=self._power, tls=self._tls
        )
        self._sessions[session] = None
        sessions.start_soon(self._serve_one, session)

    def _make_room(self) -> bool:
        """Drop the client that has been negotiating the longest, if there is one."""
        for session in self._sessions:
            if session.negotiating:
                session.cut_off()
                del self._sessions[session]
                return True
        return False

    def _turn_away(self, sock: socket.socket, client: str) -> None:
        sock.close()
        reason = f"{client}: all {self._places} places are taken"
        if trio.current_time() < self._noted + _NOTE_S:
            return  # a flood of them must not fill the recordings
        self._noted = trio.current_time()
        log.warning("a client is turned away", reason=reason)
        for export in self._exports.noted:
            export.note(NoteKind.REFUSED, reason)

    async def _serve_one(self, session: Session) -> None:
        try:
            await session.run()
        finally:
            self._sessions.pop(session, None)


def _places() -> int:
    """Return how many clients there may be at once."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_CLIENTS
    free = limit - len(os.listdir("/proc/self/fd")) - _RESERVED  # noqa: PTH208 - names only
    return max(1, min(MAX_CLIENTS, free))

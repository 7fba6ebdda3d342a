"""Runs an export: listens, lets clients in, ends in order or by a cut.

`serve` is the door to this room for plain code: it starts the event loop and returns when the
serving is over.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from nbdproxy.policy.model import CutEvent
from nbdproxy.recording.notes import NoteKind
from nbdproxy.server.endpoints import Endpoint
from nbdproxy.server.export import Export
from nbdproxy.server.qmp import QmpListener
from nbdproxy.server.session import Session

log = structlog.get_logger()

_GRACE_S = 5.0
"""Seconds that sessions have at the end to answer what is in flight; then they are cut off."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the serving ended: in which words, and with what exit code of the --run command."""

    reason: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A shell command to serve for, with `$uri`, `$socket` and `$export` set."""

    command: str


def serve(
    export: Export,
    endpoint: Endpoint,
    *,
    run: Run | None = None,
    qmp: Path | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> Outcome:
    """Serve until a signal, the end of the command, a cut, or a failure of the recording.

    Raises the export's RecordingError in the last case. The caller closes export and endpoint.
    """
    service = Service(export, endpoint, run=run, qmp=qmp, on_ready=on_ready)
    outcome = trio.run(service.main)
    if export.failure is not None:
        raise export.failure
    return outcome


class Service:
    """One export behind one endpoint, for one run of the event loop."""

    def __init__(
        self,
        export: Export,
        endpoint: Endpoint,
        *,
        run: Run | None,
        qmp: Path | None,
        on_ready: Callable[[], None],
    ) -> None:
        self._export = export
        self._endpoint = endpoint
        self._run = run
        self._on_ready = on_ready
        self._sessions: set[Session] = set()
        self._connections = 0
        self._ending = trio.Event()
        self._reason = ""
        self._exit_code = 0
        self._clients = trio.CancelScope()
        self._accepting = trio.CancelScope()
        self._qmp = QmpListener(qmp, self._on_qmp) if qmp is not None else None

    async def main(self) -> Outcome:
        """Serve, and end; a second signal ends at once until the very last client has left."""
        async with trio.open_nursery() as signals:
            await signals.start(self._watch_signals)
            await self._serve()
            signals.cancel_scope.cancel()
        return Outcome(self._export.fence_reason or self._reason, self._exit_code)

    async def _serve(self) -> None:
        async with trio.open_nursery() as everything, trio.open_nursery() as service:
            service.start_soon(self._watch_export)
            if self._qmp is not None:
                self._export.before_flush = self._poll_qmp
                service.start_soon(self._qmp.run)
            everything.start_soon(self._serve_clients)
            if self._run is not None:
                service.start_soon(self._run_command, self._run)
            self._on_ready()
            await self._ending.wait()
            await self._stop()
            service.cancel_scope.cancel()

    async def _stop(self) -> None:
        """Let no one in any more; let the sessions end in order, or cut them off."""
        self._accepting.cancel()
        export = self._export
        if export.cuts_at(CutEvent.EXIT):
            export.fence(self._reason)
        if export.fenced:
            await export.cut()
            self._clients.cancel()
            return
        for session in self._sessions:
            session.stop_reading()
        self._clients.deadline = trio.current_time() + _GRACE_S

    def _end(self, reason: str) -> None:
        if not self._ending.is_set():
            self._reason = reason
            self._ending.set()

    async def _serve_clients(self) -> None:
        with self._clients:
            async with trio.open_nursery() as sessions:
                with self._accepting:
                    await self._accept(sessions)
                self._endpoint.close()

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
                await trio.sleep(0.1)
                continue
            self._welcome(sock, sessions)

    def _welcome(self, sock: socket.socket, sessions: trio.Nursery) -> None:
        if self._export.fenced or self._ending.is_set():
            sock.close()
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            client = self._endpoint.client(sock)
        except OSError:  # gone already
            sock.close()
            return
        self._connections += 1
        exports = {self._export.info.name: self._export}
        session = Session(sock, self._connections, client, exports)
        self._sessions.add(session)
        sessions.start_soon(self._serve_one, session)

    async def _serve_one(self, session: Session) -> None:
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def _watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if self._ending.is_set():
                    os._exit(128 + number)
                self._end(f"ended by {signal.Signals(number).name}")

    async def _watch_export(self) -> None:
        async with trio.open_nursery() as watchers:
            watchers.start_soon(self._when_failed)
            await self._export.fence_event.wait()
            if self._ending.is_set():
                return
            # With a command, the machine stays dark until the command has ended.
            await self._export.cut()
            self._accepting.cancel()
            for session in self._sessions:
                session.cut_off()
            log.info("the power is cut", reason=self._export.fence_reason)
            if self._run is None:
                self._end(self._export.fence_reason)

    async def _when_failed(self) -> None:
        await self._export.failed.wait()
        self._end("the recording failed")

    def _poll_qmp(self) -> None:
        if self._qmp is not None:
            self._qmp.poll()

    def _on_qmp(self, event: str, text: str) -> None:
        if self._export.fenced:
            return
        self._export.note(NoteKind.QMP, text)
        if event == "SHUTDOWN" and self._export.cuts_at(CutEvent.SHUTDOWN):
            self._export.fence("QEMU reported SHUTDOWN")

    async def _run_command(self, run: Run) -> None:
        path = self._endpoint.path
        name = self._export.info.name
        environment = {
            **os.environ,
            "uri": self._endpoint.uri(name),
            "socket": "" if path is None else str(path),
            "export": name,
        }
        process = await trio.lowlevel.open_process(["/bin/sh", "-c", run.command], env=environment)
        try:
            code = await process.wait()
        except trio.Cancelled:
            process.terminate()
            with trio.move_on_after(_GRACE_S, shield=True):
                await process.wait()
            raise
        self._exit_code = code if code >= 0 else 128 - code
        self._end("the command ended")

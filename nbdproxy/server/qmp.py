"""Listens to QEMU's monitor (QMP): its events tell what no request can.

SHUTDOWN comes before the flushes that QEMU sends on its own way out, so it tells exactly where the
guest's own doing ends. `poll` reads without waiting, so that the export can ask "did anything
happen?" before it takes a flush; otherwise the two sockets would race.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import structlog
import trio

log = structlog.get_logger()

_RETRY_S = 0.05
"""Seconds between attempts to connect; QEMU creates its socket some time after we start."""

_MAX_LINE = 1024 * 1024


class QmpListener:
    """Connects to the QMP socket at `path` as soon as it is there, and reports each event.

    `on_event` gets the event's name and its JSON text. When QEMU goes away the socket is waited
    for again.
    """

    def __init__(self, path: Path, on_event: Callable[[str, str], None]) -> None:
        self._path = path
        self._on_event = on_event
        self._sock: socket.socket | None = None
        self._pending = b""
        self.connected = False
        """Whether QEMU was ever there."""

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            self._sock = await self._connect()
            self.connected = True
            try:
                self._sock.send(b'{"execute": "qmp_capabilities"}\n')
                while self.poll():
                    await trio.lowlevel.wait_readable(self._sock)
            except OSError as error:
                log.debug("QMP is gone", reason=str(error))
            finally:
                self._sock.close()
                self._sock = None
                self._pending = b""
            await trio.sleep(_RETRY_S)

    async def _connect(self) -> socket.socket:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                sock.connect(str(self._path))
            except OSError:
                sock.close()
                await trio.sleep(_RETRY_S)
            else:
                if not self.connected:
                    log.info("listening to QMP", socket=str(self._path))
                return sock

    def poll(self) -> bool:
        """Report what has arrived, without waiting; False when QEMU has closed the socket."""
        while self._sock is not None:
            try:
                data = self._sock.recv(65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            *lines, self._pending = (self._pending + data).split(b"\n")
            if len(self._pending) > _MAX_LINE:
                log.warning("QMP sent a line without end; not listening any more")
                return False
            for line in lines:
                self._read(line)
        return True

    def _read(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return
        if isinstance(message, dict) and isinstance(message.get("event"), str):
            self._on_event(message["event"], line.decode(errors="replace").strip())

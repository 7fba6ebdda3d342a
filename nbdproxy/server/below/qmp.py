"""Listens to QEMU's monitor (QMP): its events tell what no request can.

SHUTDOWN comes before the flushes that QEMU sends on its own way out, so it tells exactly where the
guest's own doing ends. `poll` reads without waiting, so that the export can ask "did anything
happen?" before it takes a flush; otherwise the two sockets would race.

Events are believed, so who listens at the path is asked of the kernel first. Each turn is bounded:
a peer that sends without end holds up nobody. Not covered: a QEMU that lies.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import structlog
import trio

from nbdproxy.errors import UnsafeFolderError
from nbdproxy.lines import LONGEST, parse_object
from nbdproxy.peers import TrustedPeers

log = structlog.get_logger()

_RETRY_S = 0.05
"""Seconds between attempts to connect; QEMU creates its socket some time after we start."""

_REFUSED_S = 1.0
"""Seconds until one is tried again that broke the rules, or whose peer is not believed."""

_TURN_BYTES = 256 * 1024
"""Bytes read in one turn: more than a Unix socket holds, so all that had come before a flush."""

_TURN_LINES = 1000
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
"""Names of events: QEMU's QAPI, "Naming rules and reserved names"."""


class QmpListener:
    """Connects to the QMP socket at `path` as soon as it is there, and reports each event.

    `on_event` gets the event's name and its JSON text. When QEMU goes away the socket is waited
    for again.
    """

    def __init__(
        self,
        path: Path,
        on_event: Callable[[str, str], None],
        believed: TrustedPeers = TrustedPeers(),  # noqa: B008 - frozen
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._believed = believed
        self._sock: socket.socket | None = None
        self._pending = b""
        self._warned = ""
        self._endless = False
        self._waiting: trio.CancelScope | None = None
        self.connected = False
        """Whether QEMU was ever there."""

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            self._sock = await self._connect()
            self.connected = True
            pause_s = _RETRY_S
            try:
                self._sock.send(b'{"execute": "qmp_capabilities"}\n')
                while self.poll():
                    if b"\n" in self._pending:
                        await trio.lowlevel.checkpoint()
                        continue
                    with trio.CancelScope() as self._waiting:
                        await trio.lowlevel.wait_readable(self._sock)
                    self._waiting = None
                if self._endless:
                    self._warn("QMP sent a line without end, and was left", str(self._path))
                    pause_s = _REFUSED_S
            except OSError as error:
                log.debug("QMP is gone", reason=str(error))
            finally:
                self._sock.close()
                self._sock = None
                self._pending, self._endless = b"", False
            await trio.sleep(pause_s)

    async def _connect(self) -> socket.socket:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            pause_s = _RETRY_S
            try:
                self._believed.check_path(self._path)
                sock.connect(str(self._path))
                self._believed.check_listener(sock, self._path)
            except UnsafeFolderError as error:
                sock.close()
                self._warn("QMP is not listened to", str(error))
                pause_s = _REFUSED_S
            except OSError:
                sock.close()
            else:
                if not self.connected:
                    log.info("listening to QMP", socket=str(self._path))
                return sock
            await trio.sleep(pause_s)

    def _warn(self, what: str, why: str) -> None:
        if self._warned != why:
            log.warning(what, reason=why)
        self._warned = why

    def poll(self) -> bool:
        """Report what has arrived, without waiting; False when QEMU has closed the socket."""
        left, lines = _TURN_BYTES, _TURN_LINES
        while self._sock is not None and not self._endless:
            lines = self._report(lines)
            if left <= 0 or not lines:
                if self._waiting is not None:  # another turn is due, whatever else comes
                    self._waiting.cancel()
                return True
            try:
                data = self._sock.recv(min(left, 65536))
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            left -= len(data)
            self._pending += data
        return not self._endless

    def _report(self, most: int) -> int:
        """Report whole lines that are pending, `most` at most; return how many more may be."""
        *whole, rest = self._pending.split(b"\n", most)
        self._pending = rest
        self._endless = b"\n" not in rest and len(rest) > LONGEST
        for line in whole:
            self._read(line)
        return most - len(whole)

    def _read(self, line: bytes) -> None:
        message = parse_object(line) if b'"event"' in line else None
        event = message.get("event") if message is not None else None
        if isinstance(event, str) and _NAME.fullmatch(event):
            self._on_event(event, line.decode().strip())

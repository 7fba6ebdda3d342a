"""An NBD server that does what a script says, byte by byte: errors on demand, lies, silence.

The script runs in a thread, once for each client; a client that goes away ends it. Whatever else
goes wrong in a script is raised by `close`. Nothing is imported from the product.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import quote

from tests.support.raw_client import (
    ACK,
    EXTENDED_HEADERS,
    GO,
    REP_INFO,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
)
from tests.support.serving import DEADLINE_S

META, CONTEXT = 4, 9
"""The reply that names a context, and the number that ours has."""

ERR_UNSUP = 0x80000001
DONE, NONE, DATA, HOLE, STATUS, ERROR = 1, 0, 1, 2, 5, 0x8001
ALL_FLAGS = 1 | 4 | 8 | 32 | 64 | 128 | 256 | 1024
"""Has flags, FLUSH, FUA, TRIM, WRITE_ZEROES, DF, multi-conn, CACHE."""


class Asked(NamedTuple):
    """A request that came."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes


class Peer:
    """One client, as the script sees it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def take(self, count: int) -> bytes:
        """Read exactly that many bytes; raises ConnectionError at an early end."""
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            if not part:
                raise ConnectionResetError("the client went away")
            data += part
        return data

    def wait_until_gone(self) -> None:
        """Read until the client closes."""
        while self.sock.recv(1 << 16):
            pass

    def greet(self, greeting: bytes = b"NBDMAGICIHAVEOPT\0\3") -> None:
        """Say hello, and take the client's flags."""
        self.sock.sendall(greeting)
        self.take(4)

    def option(self) -> tuple[int, bytes]:
        """Wait for an option."""
        magic, number, length = struct.unpack(">8sII", self.take(16))
        assert magic == b"IHAVEOPT"
        return number, self.take(length)

    def reply(self, number: int, kind: int, data: bytes = b"") -> None:
        """Answer an option."""
        self.sock.sendall(struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data)

    def open(self, size: int, flags: int = ALL_FLAGS, *, blocks: bytes = b"") -> None:
        """Negotiate like a decent server, with structured replies and `base:allocation`."""
        self.greet()
        while True:
            number, _ = self.option()
            if number == EXTENDED_HEADERS:
                self.reply(number, ERR_UNSUP)
                continue
            if number == SET_META_CONTEXT:
                self.reply(number, META, CONTEXT.to_bytes(4) + b"base:allocation")
            elif number == GO:
                self.reply(number, REP_INFO, struct.pack(">HQH", 0, size, flags))
                if blocks:
                    self.reply(number, REP_INFO, b"\0\3" + blocks)
            else:
                assert number == STRUCTURED_REPLY
            self.reply(number, ACK)
            if number == GO:
                return

    def request(self) -> Asked:
        """Wait for a request."""
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.take(28))
        assert magic == 0x25609513
        payload = self.take(length) if command == 1 else b""
        return Asked(flags, command, cookie, offset, length, payload)

    def chunk(self, asked: Asked, kind: int, data: bytes = b"", *, flags: int = DONE) -> None:
        """Send a chunk of a structured reply."""
        head = struct.pack(">IHHQI", 0x668E33EF, flags, kind, asked.cookie, len(data))
        self.sock.sendall(head + data)

    def fail(self, asked: Asked, error: int, text: str = "") -> None:
        """Answer a request with an error and a text."""
        words = text.encode()
        self.chunk(asked, ERROR, struct.pack(">IH", error, len(words)) + words)

    def serve(self, asked: Asked) -> None:
        """Answer a request as an empty disk would."""
        if asked.command == 0:
            self.chunk(asked, HOLE, struct.pack(">QI", asked.offset, asked.length))
        elif asked.command == 7:
            self.chunk(asked, STATUS, struct.pack(">III", CONTEXT, asked.length, 3))
        elif asked.command == 2:
            raise ConnectionResetError("the client said good-bye")
        else:
            self.chunk(asked, NONE)


Script = Callable[[Peer], None]


class Scripted:
    """A server on a Unix socket of its own; a context manager. `clients` counts who came."""

    def __init__(self, folder: Path, script: Script) -> None:
        path = folder / "scripted.sock"
        self.uri = f"nbd+unix:///?socket={quote(str(path))}"
        self.clients = 0
        self._script = script
        self._peers: list[socket.socket] = []
        self._failures: list[BaseException] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self.clients += 1
            self._peers.append(sock)
            self._threads.append(threading.Thread(target=self._run, args=(sock,)))
            self._threads[-1].start()

    def _run(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._script(Peer(sock))
        except OSError:
            pass  # the client has had enough
        except BaseException as failure:
            self._failures.append(failure)

    def close(self) -> None:
        """End it; raises what went wrong in a script."""
        for sock in (self._listening, *self._peers):
            if sock.fileno() >= 0:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a script does not end"
        for failure in self._failures:
            raise failure

    def __enter__(self) -> Scripted:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

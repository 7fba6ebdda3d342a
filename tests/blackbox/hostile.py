"""A hostile NBD server, for servers that pass on what another server serves.

It negotiates as it should and then lies as its `Plan` says: about the export's size, about extents,
or it goes away in the middle of the options. Every connection gets the same.

Not covered: TLS, extended headers, and keeping data: reads are zeroes, writes are forgotten.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.blackbox import haggle as h
from tests.blackbox import ops as o

_FLAGS = o.HAS_FLAGS | o.SEND_FLUSH | o.SEND_FUA | o.SEND_TRIM | o.SEND_ZEROES
_REPLY = struct.Struct(">QIII")


@dataclass(frozen=True, slots=True)
class Plan:
    """What it lies about.

    extents: the payload of every chunk BLOCK_STATUS; said_length: what its header says of it;
    options: as many options are answered before the connection is dropped.
    """

    size: int = 1 << 20
    extents: bytes = struct.pack(">3I", 1, 1 << 20, 0)
    said_length: int | None = None
    options: int = 1000


class Hostile:
    """A listening socket and a thread for each connection; a context manager."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.uri, self._plan = f"nbd+unix:///disk?socket={path}", plan
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Hostile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Wakes the thread that waits in accept, which closing alone does not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError, struct.error):
            peer.settimeout(20)
            peer.sendall(h.GREETING + b"\0\3")
            _take(peer, 4)
            structured = self._negotiate(peer)
            while structured is not None and self._answer(peer, structured):
                pass

    def _negotiate(self, peer: socket.socket) -> bool | None:
        """Return whether replies are structured, or None when the connection is to be dropped."""
        structured = False
        for _ in range(self._plan.options):
            _, option, length = struct.unpack(">8sII", _take(peer, 16))
            _take(peer, length)
            replies = self._replies(option)
            for kind, data in replies:
                peer.sendall(_REPLY.pack(0x3E889045565A9, option, kind, len(data)) + data)
            structured = structured or option == h.STRUCTURED_REPLY
            if option == h.GO:
                return structured
            if option == h.ABORT:
                return None
        return None

    def _replies(self, option: int) -> list[tuple[int, bytes]]:
        ack = (h.ACK, b"")
        if option in {h.INFO, h.GO}:
            return [(h.REP_INFO, struct.pack(">HQH", 0, self._plan.size, _FLAGS)), ack]
        if option in {h.LIST_META, h.SET_META}:
            return [(h.META_CONTEXT, struct.pack(">I", 1) + h.ALLOCATION.encode()), ack]
        if option == h.LIST:
            return [(h.SERVER, h.sized(b"disk")), ack]
        return [ack] if option in {h.STRUCTURED_REPLY, h.ABORT} else [(0x80000001, b"")]

    def _answer(self, peer: socket.socket, structured: bool) -> bool:
        """Answer one request; return whether the connection goes on."""
        head = _take(peer, 28)
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", head)
        if command == o.WRITE:
            _take(peer, length)
        if command == o.DISC:
            return False
        chunk = struct.Struct(">IHHQI")
        if command == o.STATUS:
            said = self._plan.said_length
            said = len(self._plan.extents) if said is None else said
            header = chunk.pack(0x668E33EF, 1, o.CHUNK_STATUS, cookie, said)
            peer.sendall(header + self._plan.extents)
        elif command == o.READ and structured:
            header = chunk.pack(0x668E33EF, 1, o.CHUNK_DATA, cookie, length + 8)
            peer.sendall(header + struct.pack(">Q", offset) + bytes(length))
        else:
            body = bytes(length) if command == o.READ else b""
            peer.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + body)
        return True


def _take(peer: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = peer.recv(min(count - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("the client left")
        data += part
    return bytes(data)

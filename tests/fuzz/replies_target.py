"""Requests and their results into `Replies`; the first two bytes choose the style and the room.

What a strict reader makes of the stream must be what was put in, whatever became a hole, however
the replies lie in the buffers.
"""

from __future__ import annotations

import struct

from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.replies import Replies
from nbdproxy.requests import NbdErrno, Request
from tests.nbd import spec
from tests.nbd.decode import Answer, Sent, decode

MIB = 1024 * 1024
NOTHING = memoryview(b"")
ARENAS = (0, 64, 4096, 20_000, 70_000, MIB)
"""What the second byte of an input for `replies` chooses from."""

ACTIONS = ("done", "fail", "read", "take back", "status", "take")
ROW = struct.Struct(">BBHBH")
"""An action of an input for `replies`: which, flags, offset and length in sectors, a pattern."""


def run(data: bytes) -> None:
    """Replies to requests, and what a client reads."""
    if len(data) < 2:
        return
    style = ReplyStyle(data[0] % len(ReplyStyle))
    book = _Book(style, Replies(style, arena=ARENAS[data[1] % len(ARENAS)]))
    rows = data[2 : len(data) - (len(data) - 2) % ROW.size]
    for number, row in enumerate(ROW.iter_unpack(rows)):
        book.act(number, row)
    book.close()


class _Book:
    """What was put into replies, and what must come out."""

    def __init__(self, style: ReplyStyle, put: Replies) -> None:
        self._style, self._put = style, put
        self._sent: list[Sent] = []
        self._expected: dict[int, Answer] = {}
        self._stream = b""

    def act(self, cookie: int, row: tuple[int, int, int, int, int]) -> None:
        """Put in one reply."""
        action, flags, sector, sectors, mask = row
        name = ACTIONS[action % len(ACTIONS)]
        if name == "take":
            self._stream += b"".join(bytes(part) for part in self._put.take())
            return
        if name == "status" and self._style is ReplyStyle.SIMPLE:
            name = "fail"
        command = {"read": 0, "take back": 0, "status": 7}.get(name, (1, 3, 4, 6)[flags % 4])
        flags &= {0: spec.DF, 7: spec.REQ_ONE}.get(command, 0)
        if self._style is ReplyStyle.SIMPLE:
            flags = 0
        length = 512 * (1 + sectors)
        request = Request(command, flags, cookie, 512 * sector, length, NOTHING)
        self._sent.append(Sent(*request[:5]))
        expected = self._expected[cookie] = Answer(done=True)
        if name == "done":
            self._put.done(request)
        elif name == "fail":
            self._fail(request, expected, mask)
        elif name == "status":
            self._status(request, expected, mask)
        else:
            self._read(request, expected, mask)
            if name == "take back":
                self._put.take_back_read(request)
                expected.data = bytearray()
                self._fail(request, expected, mask)
            else:
                self._put.finish_read(request)

    def close(self) -> None:
        """Compare what a client reads with what was put in."""
        self._stream += b"".join(bytes(part) for part in self._put.take())
        assert self._put.take() == []
        found = decode(self._stream, self._style, self._sent)
        for cookie, expected in self._expected.items():
            answer = found[cookie]
            answer.pieces = []
            assert answer == expected, f"the reply to {self._sent} number {cookie}"

    def _fail(self, request: Request, expected: Answer, mask: int) -> None:
        expected.error = [error for error in NbdErrno if error][mask % 8]
        text = "ä broken sector 😀"[: mask % 19] * (mask // 19 % 100)
        self._put.fail(request, expected.error, text)
        if self._style is not ReplyStyle.SIMPLE:
            expected.text = text.encode()[: spec.TEXT_MAX].decode(errors="ignore")

    def _read(self, request: Request, expected: Answer, mask: int) -> None:
        for number in range(request.length // 512):
            full = mask >> number // 3 % 16 & 1
            expected.data += bytes([1 + number % 255]) * 512 if full else bytes(512)
        place = self._put.reserve_read(request)
        assert len(place) == request.length
        place[:] = expected.data

    def _status(self, request: Request, expected: Answer, mask: int) -> None:
        """Extents whose last one may be longer than asked, up to far over 32 bits."""
        last = 512 << mask % 54
        if request.flags & spec.REQ_ONE:
            extents = [(min(last, request.length), mask % 4)]
        else:
            few = min(mask // 54 % 8, request.length // 512 - 1)
            extents = [(512, number % 4) for number in range(few)] + [(last, mask % 4)]
        self._put.status(request, extents)
        length, state = extents[-1]
        if self._style is ReplyStyle.STRUCTURED and length > 2**32 - 65_536:
            extents = [*extents[:-1], (2**32 - 65_536, state)]
        expected.extents = extents

"""The client's side of transmission: requests, and replies in all three styles, strictly read.

Requests can be sent in one piece or many; replies are collected by cookie in whatever order and
however interleaved they come. `chunks` holds the rules for what one chunk may say.

Not covered: whether data and extents are true, which is the checks' business.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.blackbox.chunks import Answer, digest
from tests.blackbox.haggle import GO, INFO_BLOCK_SIZE, Export, Haggle
from tests.blackbox.ops import DISC, ERRORS, PAYLOAD_LEN, PAYLOAD_MOST, READ, STATUS, WRITE, Op
from tests.blackbox.wire import AbsentError, ViolationError, Wire

REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC = 0x25609513, 0x21E41C71
_SIMPLE_MAGIC, _STRUCTURED_MAGIC, _EXTENDED_MAGIC = 0x67446698, 0x668E33EF, 0x6E8A278C
_DONE = 1


class Style(enum.Enum):
    """Which replies were negotiated."""

    SIMPLE = enum.auto()
    STRUCTURED = enum.auto()
    EXTENDED = enum.auto()


@dataclass(slots=True)
class Request:
    """A request that waits for the end of its answer."""

    op: Op
    answer: Answer = field(default_factory=Answer)


class Transmission:
    """A connection in transmission.

    size, flags, export: what the server told of the export; contexts: selected ids and names;
    waiting: what was sent and is not answered to its end, by cookie.
    """

    def __init__(self, haggle: Haggle, export: Export) -> None:
        self.wire: Wire = haggle.wire
        self.style = Style.STRUCTURED if haggle.structured else Style.SIMPLE
        if haggle.extended:
            self.style = Style.EXTENDED
        self.export, self.size, self.flags = export, export.size, export.flags
        self.contexts = haggle.contexts
        self.waiting: dict[int, Request] = {}
        self.next_cookie = 1

    @property
    def minimum(self) -> int:
        """The smallest block; section "Size constraints"."""
        return self.export.block_sizes[0] if self.export.block_sizes else 1

    @property
    def payload_most(self) -> int:
        """The longest payload."""
        return self.export.block_sizes[2] if self.export.block_sizes else PAYLOAD_MOST

    def need(self, flag: int, what: str) -> None:
        """Raise AbsentError unless the export advertises a transmission flag."""
        if not self.flags & flag:
            raise AbsentError(f"{what} is not advertised (flags {self.flags:#x})")

    def pack(self, op: Op) -> bytes:
        """Return a request's bytes under a new cookie; from then on it waits for its answer."""
        cookie = self.next_cookie
        self.next_cookie = (cookie + 1) % (1 << 64)
        op = op._replace(length=op.length or len(op.data))
        if self.style is Style.EXTENDED:
            if op.command == WRITE and op.data:
                op = op._replace(flags=op.flags | PAYLOAD_LEN)
            magic, layout = EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST
        else:
            magic, layout = REQUEST_MAGIC, REQUEST
        if op.command != DISC:
            self.waiting[cookie] = Request(op)
        header = layout.pack(magic, op.flags, op.command, cookie, op.offset, op.length)
        return header + op.data

    def send(self, *ops: Op) -> list[int]:
        """Send requests in one piece; return their cookies."""
        cookies, parts = [], []
        for op in ops:
            cookies.append(self.next_cookie)
            parts.append(self.pack(op))
        self.wire.send(b"".join(parts))
        return cookies

    def receive(self) -> tuple[int, Answer]:
        """Read until one request is answered to its end; return its cookie and the answer."""
        while True:
            cookie, done = self._message()
            if done:
                request = self.waiting.pop(cookie)
                request.answer.finish(request.op, self.contexts)
                return cookie, request.answer

    def _message(self) -> tuple[int, bool]:
        head = self.wire.take(16)
        magic, middle, cookie = struct.unpack(">IIQ", head)
        if magic == _SIMPLE_MAGIC:
            self._simple(middle, self._request(cookie))
            return cookie, True
        expected = {Style.STRUCTURED: _STRUCTURED_MAGIC, Style.EXTENDED: _EXTENDED_MAGIC}
        if magic != expected.get(self.style):
            raise ViolationError(
                f"a reply in {self.style.name.lower()} style begins with {magic:#x}"
            )
        flags, kind = middle >> 16, middle & 0xFFFF
        request = self._request(cookie)
        if self.style is Style.EXTENDED:
            offset, length = struct.unpack(">QQ", self.wire.take(16))
            if offset != request.op.offset:
                raise ViolationError(f"the reply's offset is {offset}, not {request.op.offset}")
        else:
            (length,) = struct.unpack(">I", self.wire.take(4))
        if flags & ~_DONE:
            raise ViolationError(f"a chunk has the unknown flags {flags:#x}")
        if length > self.payload_most + 64:
            raise ViolationError(f"a chunk of {length} bytes; the maximum is {self.payload_most}")
        body, extended = self.wire.take(length), self.style is Style.EXTENDED
        digest(request.answer, request.op, kind, body, done=bool(flags), extended=extended)
        return cookie, bool(flags)

    def _request(self, cookie: int) -> Request:
        if cookie not in self.waiting:
            raise ViolationError(f"a reply to the cookie {cookie:#x}, for which nobody waits")
        return self.waiting[cookie]

    def _simple(self, error: int, request: Request) -> None:
        op, answer = request.op, request.answer
        if self.style is Style.EXTENDED:
            raise ViolationError("a simple reply although extended headers were negotiated")
        if self.style is Style.STRUCTURED and (op.command == READ or answer.chunks):
            raise ViolationError(
                "a simple reply to a READ although structured replies were negotiated"
            )
        if op.command == STATUS and not error:
            raise ViolationError("BLOCK_STATUS succeeds by a simple reply")
        if error not in ERRORS:
            raise ViolationError(f"the error {error} is not in the list of errors")
        answer.simple, answer.error = True, error
        if op.command == READ and not error:
            answer.data = self.wire.take(op.length)

    def collect(self, cookies: Iterable[int]) -> dict[int, Answer]:
        """Wait for the answers to all of `cookies`; others that come before are returned, too."""
        wanted, found = set(cookies), {}
        while wanted:
            cookie, answer = self.receive()
            wanted.discard(cookie)
            found[cookie] = answer
        return found

    def do(self, *ops: Op) -> list[Answer]:
        """Send requests in one piece and wait for all; return the answers in the same order."""
        cookies = self.send(*ops)
        found = self.collect(cookies)
        return [found[cookie] for cookie in cookies]

    def word(self, op: Op) -> str:
        """Send a request; return OK or its error's name."""
        (answer,) = self.do(op)
        return ERRORS[answer.error]

    def read(self, offset: int, length: int) -> bytes:
        """READ; an error is a ViolationError, because such a read had to succeed."""
        (answer,) = self.do(Op(READ, offset, length))
        if answer.error:
            raise ViolationError(f"READ of {length} at {offset} fails with {ERRORS[answer.error]}")
        return answer.data

    def must(self, *ops: Op) -> None:
        """Do what has to succeed, one after the other; an error is a ViolationError."""
        for op in ops:
            if (word := self.word(op)) != "OK":
                what = f"command {op.command} at {op.offset}, flags {op.flags:#x}"
                raise ViolationError(f"{what} fails with {word}")

    def disc(self) -> None:
        """DISC; the server must close and say nothing more."""
        self.send(Op(DISC))
        if rest := self.wire.rest():
            raise ViolationError(f"{len(rest)} bytes come after DISC")
        self.wire.close()

    def leave(self) -> None:
        """DISC, and hang up: whether a server closes by itself is asked by checks of DISC."""
        self.send(Op(DISC))
        self.wire.close()


def enter(haggle: Haggle, name: str | bytes, *requests: int) -> Transmission:
    """GO to an export, asking for its block sizes; raises AbsentError when the server refuses."""
    word, export = haggle.describe(GO, name, requests or (INFO_BLOCK_SIZE,))
    if word != "ACK":
        raise AbsentError(f"GO is answered with {word}")
    return Transmission(haggle, export)

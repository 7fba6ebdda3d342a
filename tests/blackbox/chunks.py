"""What one chunk of a structured or extended reply may say; section "Structured reply types".

`digest` reads a chunk into the request's `Answer`, and `Answer.finish` checks the whole once the
last chunk came: content covers a read exactly, nothing overlaps, DF and REQ_ONE are kept, and every
selected context has one list of extents.

Not covered: what the header says (see `transmit`), and whether the content is true.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.blackbox import ops
from tests.blackbox.haggle import text
from tests.blackbox.ops import Op
from tests.blackbox.wire import ViolationError

_OFFSET_ERRORS = {ops.READ, ops.WRITE, ops.TRIM, ops.CACHE, ops.ZEROES, ops.STATUS}
_EXTENTS_MOST = 1 << 20


@dataclass(slots=True)
class Answer:
    """The whole answer to one request.

    error: the first error's number, or 0; message: its text;
    chunks: the kinds of chunks in order, empty for a simple reply;
    contents: offset and length of each content chunk, and whether it was a hole;
    extents: lengths and flags by context id.
    """

    error: int = 0
    message: str = ""
    data: bytes = b""
    simple: bool = False
    chunks: list[int] = field(default_factory=list)
    contents: list[tuple[int, int, bool]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    pieces: dict[int, bytes] = field(default_factory=dict)

    def finish(self, op: Op, contexts: dict[int, str]) -> None:
        """Check the whole answer; puts a read's data together."""
        if self.simple or self.error:
            return
        if op.command == ops.READ:
            self._assemble(op)
        if op.command == ops.STATUS:
            wanted = set(contexts)
            if op.flags & ops.PAYLOAD_LEN:
                ids = struct.unpack(f">{(len(op.data) - 8) // 4}I", op.data[8:])
                wanted = set(ids)
            if set(self.extents) != wanted:
                raise ViolationError(f"extents of the contexts {list(self.extents)}, not {wanted}")

    def _assemble(self, op: Op) -> None:
        if op.flags & ops.DF and len(self.contents) > 1:
            raise ViolationError(f"{len(self.contents)} content chunks in spite of DF")
        end, parts = op.offset, []
        for offset, length, hole in sorted(self.contents):
            if offset != end:
                raise ViolationError(f"the content of a READ has a gap or overlap at {end}")
            parts.append(bytes(length) if hole else self.pieces[offset])
            end = offset + length
        if end != op.offset + op.length:
            raise ViolationError(
                f"the content of a READ ends at {end}, not {op.offset + op.length}"
            )
        self.data, self.pieces = b"".join(parts), {}


def digest(answer: Answer, op: Op, kind: int, body: bytes, *, done: bool, extended: bool) -> None:
    """Enter one chunk into the answer; raises ViolationError."""
    answer.chunks.append(kind)
    if kind == ops.CHUNK_NONE:
        if body or not done:
            raise ViolationError(f"a chunk NONE with {len(body)} bytes, final: {done}")
    elif kind >> 15:
        _error(answer, op, kind, body)
    elif kind in {ops.CHUNK_DATA, ops.CHUNK_HOLE} and op.command == ops.READ:
        _content(answer, op, kind, body)
    elif (
        kind == (ops.CHUNK_STATUS_EXT if extended else ops.CHUNK_STATUS)
        and op.command == ops.STATUS
    ):
        _status(answer, op, body, extended=extended)
    else:
        raise ViolationError(f"a chunk of kind {kind} in the answer to command {op.command}")


def _error(answer: Answer, op: Op, kind: int, body: bytes) -> None:
    fixed = 14 if kind == ops.CHUNK_ERROR_OFFSET else 6
    if kind not in {ops.CHUNK_ERROR, ops.CHUNK_ERROR_OFFSET} or len(body) < fixed:
        raise ViolationError(f"an error chunk of kind {kind:#x} with {len(body)} bytes")
    error, length = struct.unpack_from(">IH", body)
    if not error or error not in ops.ERRORS:
        raise ViolationError(f"an error chunk with the error {error}")
    if length + fixed != len(body):
        raise ViolationError(f"an error message of {length} bytes in a chunk of {len(body)}")
    if kind == ops.CHUNK_ERROR_OFFSET:
        (offset,) = struct.unpack(">Q", body[-8:])
        if op.command not in _OFFSET_ERRORS:
            raise ViolationError(f"an error with an offset to command {op.command}")
        if not op.offset <= offset < op.offset + op.length:
            raise ViolationError(f"an error at {offset}, outside the request")
    answer.error = answer.error or error
    answer.message = answer.message or text(body[6 : 6 + length], "an error message")


def _content(answer: Answer, op: Op, kind: int, body: bytes) -> None:
    if (len(body) != 12) if kind == ops.CHUNK_HOLE else (len(body) < 9):
        raise ViolationError(f"a content chunk of kind {kind} with {len(body)} bytes")
    (offset,) = struct.unpack_from(">Q", body)
    length = struct.unpack(">I", body[8:])[0] if kind == ops.CHUNK_HOLE else len(body) - 8
    if not length or offset < op.offset or offset + length > op.offset + op.length:
        raise ViolationError(f"content of {length} bytes at {offset}, outside the request")
    if any(offset < at + size and at < offset + length for at, size, _ in answer.contents):
        raise ViolationError(f"content at {offset} overlaps with earlier content")
    answer.contents.append((offset, length, kind == ops.CHUNK_HOLE))
    if kind == ops.CHUNK_DATA:
        answer.pieces[offset] = body[8:]


def _status(answer: Answer, op: Op, body: bytes, *, extended: bool) -> None:
    head, layout = (8, ">QQ") if extended else (4, ">II")
    if len(body) <= head or (len(body) - head) % struct.calcsize(layout):
        raise ViolationError(f"a status chunk of {len(body)} bytes")
    (context,) = struct.unpack_from(">I", body)
    extents = [(length, flags) for length, flags in struct.iter_unpack(layout, body[head:])]
    if extended and struct.unpack_from(">I", body, 4)[0] != len(extents):
        raise ViolationError(f"{len(extents)} extents, but the count says another number")
    if context in answer.extents:
        raise ViolationError(f"two status chunks for the context {context}")
    asked = struct.unpack(">Q", op.data[:8])[0] if op.flags & ops.PAYLOAD_LEN else op.length
    if any(not length for length, _ in extents):
        raise ViolationError(f"an extent of no bytes among {extents[:4]}")
    if any(flags >> 32 for _, flags in extents):
        raise ViolationError("the upper half of a status is not zero")
    if len(extents) > _EXTENTS_MOST:
        raise ViolationError(f"{len(extents)} extents in one chunk")
    if op.flags & ops.REQ_ONE and (len(extents) > 1 or extents[0][0] > asked > 0):
        raise ViolationError(f"REQ_ONE for {asked} bytes is answered with {extents[:4]}")
    if sum(length for length, _ in extents[:-1]) >= asked > 0:
        raise ViolationError(f"more extents than the {asked} bytes need: {extents[:4]}")
    answer.extents[context] = extents

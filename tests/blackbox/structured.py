"""Checks of structured replies: negotiation, chunks, errors with texts, holes.

The rules for a single chunk are in `chunks` and hold in every check that asks for this style; the
checks of data, errors and flushes are run in this style, too.

Not covered: BLOCK_STATUS (`metadata`), extended headers (`extended`).
"""

from __future__ import annotations

from tests.blackbox import haggle as h
from tests.blackbox import ops as o
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.errors import in_step
from tests.blackbox.handshake import in_step as options_in_step
from tests.blackbox.handshake import served
from tests.blackbox.ops import READ, WRITE, Op
from tests.blackbox.running import DATA_BYTES, SCRATCH, pattern
from tests.blackbox.servers import MIB
from tests.blackbox.transmit import Style, Transmission, enter
from tests.blackbox.wire import AbsentError, ViolationError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM = Feature.STRUCTURED
QEMU_TEXT_MOST = 900
"""Bytes of an error's text; QEMU hangs up at chunks without data over 1000 bytes."""


@check("structured", ROOM, MUST, "STRUCTURED_REPLY: after the ACK, a READ is never answered simply")
def structured(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    (answer,) = client.do(Op(READ, 0, 65536))
    return "yes" if answer.data == pattern("disk")[:65536] else "wrong: the data"


@check(
    "structured-with-data",
    ROOM,
    SHOULD,
    "STRUCTURED_REPLY: a request that includes data is rejected with ERR_INVALID",
    right=("ERR_INVALID",),
    legal=("closed",),
)
def structured_with_data(bench: Bench) -> str:
    haggle = bench.haggle()
    word = haggle.word(h.STRUCTURED_REPLY, b"data")
    if word == "ERR_UNSUP":
        raise AbsentError("STRUCTURED_REPLY is answered with ERR_UNSUP")
    options_in_step(haggle)
    if word == "ERR_INVALID":
        served(enter(haggle, "disk"))
    return word


@check(
    "structured-twice",
    ROOM,
    MAY,
    "Fixed newstyle negotiation: a repeated request may fail with ERR_INVALID, and nothing is lost",
    right=("ACK", "ERR_INVALID"),
)
def structured_twice(bench: Bench) -> str:
    haggle = bench.haggle()
    haggle.need(h.STRUCTURED_REPLY, "STRUCTURED_REPLY")
    word = haggle.word(h.STRUCTURED_REPLY)
    served(enter(haggle, "disk"))
    return word


@check("structured-export-name", ROOM, MUST, "STRUCTURED_REPLY: it holds after EXPORT_NAME, too")
def structured_export_name(bench: Bench) -> str:
    haggle = bench.haggle()
    haggle.need(h.STRUCTURED_REPLY, "STRUCTURED_REPLY")
    return served(Transmission(haggle, haggle.enter_by_name("disk")))


@check("structured-df-flag", ROOM, MAY, "Transmission flags: DF is advertised once it is possible")
def structured_df_flag(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    client.need(o.SEND_DF, "DF")
    return "yes"


def _refused() -> list[Op]:
    return [
        Op(READ, 1 << 62, 512),
        Op(READ, 0, 512, flags=o.UNKNOWN_FLAG),
        Op(WRITE, 1 << 62, data=bytes(512)),
        Op(o.UNKNOWN_COMMAND),
    ]


@check(
    "structured-read-error",
    ROOM,
    MUST,
    "Structured reply chunk message: even an early EINVAL to a READ is not a simple reply",
    right=("EINVAL",),
)
def structured_read_error(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    words = {client.word(op) for op in _refused()[:2]}
    in_step(client)
    return words.pop() if len(words) == 1 else f"depends: {sorted(words)}"


@check(
    "structured-errors",
    ROOM,
    SHOULD,
    "Structured reply chunk message: errors come in structured replies, whatever the command",
)
def structured_errors(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    simple = [op.command for op in _refused() if client.do(op)[0].simple]
    in_step(client)
    return f"simple: to the commands {simple}" if simple else "yes"


@check("error-string", ROOM, MAY, "NBD_REPLY_TYPE_ERROR: an error comes with a text for a human")
def error_string(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    texts = [answer.message for answer in client.do(*_refused())]
    if not any(texts):
        raise AbsentError("errors have no text")
    if any(len(text.encode()) > QEMU_TEXT_MOST for text in texts):
        return "wrong: a text over 900 bytes, at which QEMU hangs up"
    return f"yes: {next(filter(None, texts))}" if all(texts) else f"some: {texts}"


@check("offset-hole", ROOM, MAY, "NBD_REPLY_TYPE_OFFSET_HOLE: a hole is sent as a hole")
def offset_hole(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    (answer,) = client.do(Op(READ, 2 * MIB, MIB))
    if not any(hole for _, _, hole in answer.contents):
        raise AbsentError("a READ of a hole is sent as data")
    return "yes"


@check("holes-and-data", ROOM, MUST, "READ: the chunks cover the request, in any number and order")
def holes_and_data(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    expected = bytearray(4 * MIB)
    client.must(Op(WRITE, SCRATCH, data=bytes(4 * MIB)))
    if client.flags & o.SEND_TRIM and client.flags & o.SEND_ZEROES:
        client.must(Op(o.ZEROES, SCRATCH, 4 * MIB))
    for number in range(16):
        place, data = number * 256 * 1024, bytes([number + 1]) * (4096 * (number + 1))
        client.must(Op(WRITE, SCRATCH + place, data=data))
        expected[place : place + len(data)] = data
    for start, length in ((0, 4 * MIB), (512, 4 * MIB - 1024), (4096, 65536), (65536, 131072)):
        if client.read(SCRATCH + start, length) != expected[start : start + length]:
            return f"wrong: {length} bytes at {start}"
    return "yes"


@check(
    "chunks-of-512",
    ROOM,
    SHOULD,
    "READ: chunks have lengths and offsets of whole 512 bytes where possible",
)
def chunks_of_512(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    (answer,) = client.do(Op(READ, DATA_BYTES - 65536, 131072))
    odd = [at for at, length, _ in answer.contents if at % 512 or length % 512]
    return f"wrong: chunks at {odd}" if odd else "yes"


@check("structured-interleaved", ROOM, MUST, "Transmission: chunks of several replies may mingle")
def structured_interleaved(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    image = pattern("disk") + bytes(MIB)
    reads = [Op(READ, n * 4096, 512 * 1024) for n in range(32)]
    for op, answer in zip(reads, client.do(*reads), strict=True):
        if answer.data != image[op.offset : op.offset + op.length]:
            raise ViolationError(f"the data of a pipelined READ at {op.offset}")
    return "yes"

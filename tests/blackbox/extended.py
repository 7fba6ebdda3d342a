"""Checks of extended headers; the sections are those of the EXTENDED_HEADERS extension.

The checks of data, errors and flushes are run in this style, too.

Not covered: contexts with 64-bit states, of which no server here has one.
"""

from __future__ import annotations

import struct

from tests.blackbox import haggle as h
from tests.blackbox import ops as o
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.data import filled
from tests.blackbox.errors import in_step
from tests.blackbox.handshake import in_step as options_in_step
from tests.blackbox.handshake import served
from tests.blackbox.metadata import true_extents
from tests.blackbox.ops import READ, STATUS, TRIM, WRITE, ZEROES, Op
from tests.blackbox.running import SCRATCH, pattern
from tests.blackbox.servers import BIG, MIB
from tests.blackbox.transmit import REQUEST, REQUEST_MAGIC, Style, Transmission, enter
from tests.blackbox.wire import AbsentError, ClosedError, ViolationError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM = Feature.EXTENDED
GIB = 1 << 30


def extended(bench: Bench) -> h.Haggle:
    """Connect and negotiate extended headers."""
    haggle = bench.haggle()
    haggle.need(h.EXTENDED_HEADERS, "EXTENDED_HEADERS")
    return haggle


@check("extended", ROOM, MUST, "EXTENDED_HEADERS: after the ACK all replies are extended")
def extended_replies(bench: Bench) -> str:
    client = bench.enter(style=Style.EXTENDED)
    client.must(Op(WRITE, SCRATCH, data=filled(1, 4096)), Op(o.FLUSH))
    served(client)
    return "yes"


@check(
    "extended-with-data",
    ROOM,
    SHOULD,
    "EXTENDED_HEADERS: a request that includes data is rejected with ERR_INVALID",
    right=("ERR_INVALID",),
    legal=("closed",),
)
def extended_with_data(bench: Bench) -> str:
    haggle = bench.haggle()
    word = haggle.word(h.EXTENDED_HEADERS, b"data")
    if word == "ERR_UNSUP":
        raise AbsentError("EXTENDED_HEADERS is answered with ERR_UNSUP")
    options_in_step(haggle)
    if word == "ERR_INVALID":
        served(enter(haggle, "disk"))
    return word


@check(
    "extended-then-structured",
    ROOM,
    MUST,
    "STRUCTURED_REPLY: after extended headers it cannot take over: ERR_EXT_HEADER_REQD",
    right=("ERR_EXT_HEADER_REQD",),
    legal=("ERR_INVALID",),
)
def extended_then_structured(bench: Bench) -> str:
    haggle = extended(bench)
    word = haggle.word(h.STRUCTURED_REPLY)
    served(enter(haggle, "disk"))
    return word


@check("structured-then-extended", ROOM, SHOULD, "EXTENDED_HEADERS: takes over from structured")
def structured_then_extended(bench: Bench) -> str:
    haggle = bench.haggle()
    haggle.need(h.STRUCTURED_REPLY, "STRUCTURED_REPLY")
    haggle.need(h.EXTENDED_HEADERS, "EXTENDED_HEADERS")
    return served(enter(haggle, "disk"))


@check(
    "extended-export-name",
    ROOM,
    CARE,
    "EXTENDED_HEADERS: a client must not use EXPORT_NAME then, and the server hangs up",
    right=("closed",),
    legal=("served",),
)
def extended_export_name(bench: Bench) -> str:
    haggle = extended(bench)
    try:
        served(Transmission(haggle, haggle.enter_by_name("disk")))
    except ClosedError:
        return "closed"
    return "served"


@check("extended-contexts", ROOM, MUST, "SET_META_CONTEXT: extended headers alone suffice for it")
def extended_contexts(bench: Bench) -> str:
    client = bench.enter(style=Style.EXTENDED, status=True)
    return true_extents(client, one=False, step=64 * MIB)


@check("extended-req-one", ROOM, MUST, "REQ_ONE: one extent, no longer than the request, and true")
def extended_req_one(bench: Bench) -> str:
    client = bench.enter(style=Style.EXTENDED, status=True)
    return true_extents(client, one=True, step=5 * MIB)


@check(
    "extended-write-without-flag",
    ROOM,
    CARE,
    "PAYLOAD_LEN: QEMU's client (10.0) leaves it out of a WRITE, against the rule, and sends the "
    "payload all the same; that is taken",
    right=("OK",),
    legal=("closed",),
)
def extended_write_without_flag(bench: Bench) -> str:
    client = bench.enter(style=Style.EXTENDED)
    client.wire.send(client.pack(Op(WRITE, SCRATCH, 512)) + b"q" * 512)
    (_, answer) = client.receive()
    in_step(client)
    if not answer.error and client.read(SCRATCH, 512) != b"q" * 512:
        return "lost"
    return o.ERRORS[answer.error]


@check(
    "extended-payload-unexpected",
    ROOM,
    MUST,
    "PAYLOAD_LEN: EINVAL where a command takes no payload, and the payload is consumed",
    right=("EINVAL",),
    legal=("closed",),
)
def extended_payload_unexpected(bench: Bench) -> str:
    client = bench.enter(style=Style.EXTENDED)
    words = set()
    for command in (READ, TRIM, ZEROES, o.CACHE, o.FLUSH, o.UNKNOWN_COMMAND):
        words.add(client.word(Op(command, 0, data=bytes(4096), flags=o.PAYLOAD_LEN)))
        in_step(client)
    return words.pop() if len(words) == 1 else f"depends: {sorted(words)}"


@check(
    "extended-payload-oversize",
    ROOM,
    SHOULD,
    "Request message: a payload longer than the maximum ends the connection",
    right=("closed",),
    legal=("EINVAL", "EOVERFLOW"),
)
def extended_payload_oversize(bench: Bench) -> str:
    for length in (1 << 31, 1 << 40, (1 << 64) - 512):
        client = bench.enter(style=Style.EXTENDED)
        client.wire.send(client.pack(Op(WRITE, 0, length, flags=o.PAYLOAD_LEN)) + bytes(4096))
        client.wire.half_close()
        client.wire.rest()
    return "closed"


@check(
    "extended-compact-request",
    ROOM,
    MAY,
    "Request message: with extended headers a compact request is a violation; the server hangs up",
    right=("closed",),
    legal=("answers",),
)
def extended_compact_request(bench: Bench) -> str:
    client = bench.enter(style=Style.EXTENDED)
    client.wire.send(REQUEST.pack(REQUEST_MAGIC, 0, READ, 1, 0, 512) + bytes(4))
    return f"answers: {said[:32].hex()}" if (said := client.wire.rest()) else "closed"


@check(
    "extended-64-bit",
    ROOM,
    MUST,
    "Request message: effect lengths have 64 bits for WRITE_ZEROES, TRIM, CACHE and BLOCK_STATUS",
)
def extended_64_bit(bench: Bench) -> str:
    client = bench.enter(BIG, style=Style.EXTENDED, status=True)
    client.must(Op(WRITE, 6 * GIB, data=filled(1, 4096)))
    client.must(Op(ZEROES, GIB, 6 * GIB), Op(TRIM, GIB, 6 * GIB))
    if client.read(6 * GIB, 4096).strip(b"\0"):
        return "wrong: WRITE_ZEROES over 4 GiB left data"
    if client.flags & o.SEND_CACHE:
        client.must(Op(o.CACHE, GIB, 5 * GIB))
    (answer,) = client.do(Op(STATUS, GIB, 6 * GIB))
    if answer.error:
        return f"wrong: BLOCK_STATUS of 6 GiB fails with {o.ERRORS[answer.error]}"
    (extents,) = answer.extents.values()
    covered = sum(length for length, _ in extents)
    return "yes" if covered > 4 * GIB else f"short: {covered} bytes in one answer"


@check(
    "extended-long-read",
    ROOM,
    SHOULD,
    "READ: one over the maximum payload is split or refused, with EOVERFLOW or EINVAL",
    right=("EOVERFLOW", "EINVAL"),
)
def extended_long_read(bench: Bench) -> str:
    client = bench.enter(BIG, style=Style.EXTENDED)
    words = {client.word(Op(READ, 0, length)) for length in (5 * GIB, 4 * GIB + 512)}
    in_step(client)
    return words.pop() if len(words) == 1 else f"depends: {sorted(words)}"


def _filtered(bench: Bench) -> Transmission:
    client = bench.enter(style=Style.EXTENDED, status=True)
    client.need(o.STATUS_PAYLOAD, "BLOCK_STATUS_PAYLOAD")
    return client


def _payload(length: int, *contexts: int) -> bytes:
    return struct.pack(f">Q{len(contexts)}I", length, *contexts)


@check("status-payload", ROOM, MAY, "BLOCK_STATUS: a payload names the contexts to answer for")
def status_payload(bench: Bench) -> str:
    client = _filtered(bench)
    (context,) = client.contexts
    answers = client.do(
        Op(STATUS, 0, data=_payload(MIB, context), flags=o.PAYLOAD_LEN),
        Op(STATUS, 0, data=_payload(MIB, context), flags=o.PAYLOAD_LEN | o.REQ_ONE),
    )
    in_step(client)
    return "yes" if not any(answer.error for answer in answers) else "wrong: it fails"


@check(
    "status-payload-wrong",
    ROOM,
    MUST,
    "BLOCK_STATUS: EINVAL for unknown or repeated contexts, and the payload is consumed",
    right=("EINVAL",),
)
def status_payload_wrong(bench: Bench) -> str:
    client = _filtered(bench)
    (context,) = client.contexts
    payloads = {
        "an unknown context": _payload(MIB, context ^ 0x5A5A),
        "a context twice": _payload(MIB, context, context),
        "a known and an unknown one": _payload(MIB, context, context + 1),
        "half a context": _payload(MIB, context)[:-2],
        "half a length": bytes(4),
        "many": _payload(MIB, *range(1000, 2000)),
        "past the end": _payload(client.size + MIB, context),
    }
    odd = {}
    for what, data in payloads.items():
        client.send(Op(STATUS, 0, data=data, flags=o.PAYLOAD_LEN))
        _, answer = client.receive()
        if o.ERRORS[answer.error] != "EINVAL":
            odd[what] = o.ERRORS[answer.error]
        in_step(client)
    return f"accepts: {odd}" if odd else "EINVAL"


@check(
    "status-payload-unadvertised",
    ROOM,
    MUST,
    "BLOCK_STATUS_PAYLOAD: not advertised to a client without extended headers",
)
def status_payload_unadvertised(bench: Bench) -> str:
    bench.enter(style=Style.EXTENDED)
    client = bench.enter(style=Style.STRUCTURED, status=True)
    if client.flags & o.STATUS_PAYLOAD:
        raise ViolationError(f"the flags are {client.flags:#x} with structured replies")
    return "yes"


@check("extended-data", ROOM, MUST, "Extended reply: the header's offset is the request's own")
def extended_data(bench: Bench) -> str:
    client = bench.enter(style=Style.EXTENDED)
    reads = [Op(READ, n * 65536, 65536) for n in range(16)]
    answers = client.do(*reads)
    found = b"".join(answer.data for answer in answers)
    return "yes" if found == pattern("disk") else "wrong: the data"

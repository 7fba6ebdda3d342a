"""Checks of errors in transmission: each one's number, and that the stream stays in step.

Not covered: errors of the disk itself, which no peer can be made to have.
"""

from __future__ import annotations

from collections import Counter

from tests.blackbox import ops as o
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check, check_styles
from tests.blackbox.ops import CACHE, FLUSH, READ, TRIM, WRITE, ZEROES, Op
from tests.blackbox.running import SCRATCH, pattern
from tests.blackbox.servers import MIB, PLAIN, READ_ONLY, Setup
from tests.blackbox.transmit import Style, Transmission
from tests.blackbox.wire import ViolationError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM = Feature.ERRORS


def in_step(client: Transmission) -> None:
    """The next request is understood as such; otherwise a Violation."""
    with client.wire.clock.muted():
        data = client.read(0, 4096)
    if data != pattern("disk")[:4096]:
        raise ViolationError("afterwards, a READ returns wrong data")


def agreed(client: Transmission, requests: list[Op]) -> str:
    """Return the word that all requests are answered with, or "depends" and all words."""
    words = {}
    for op in requests:
        what = f"command {op.command} at {op.offset:#x}, {op.length or len(op.data)} bytes"
        words[f"{what}, flags {op.flags:#x}"] = client.word(op)
        in_step(client)
    common, _ = Counter(words.values()).most_common(1)[0]
    others = [f"{word} to {what}" for what, word in words.items() if word != common]
    return f"depends: {common}, but {', '.join(others)}" if others else common


def _past_end(client: Transmission, command: int) -> list[Op]:
    places = (client.size - 4096, client.size, client.size + MIB, 1 << 62, (1 << 64) - 4096)
    if command == WRITE:
        return [Op(command, place, data=bytes(8192)) for place in places]
    return [Op(command, place, 8192) for place in places]


@check_styles(
    "write-past-end",
    Feature.PAST_END,
    SHOULD,
    "Error values: ENOSPC for a write past the end, and its payload is consumed",
    right=("ENOSPC",),
    legal=("closed",),
)
def write_past_end(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    return agreed(client, _past_end(client, WRITE))


@check_styles(
    "zeroes-past-end",
    Feature.PAST_END,
    SHOULD,
    "WRITE_ZEROES: ENOSPC past the end",
    right=("ENOSPC",),
    legal=("closed",),
)
def zeroes_past_end(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.need(o.SEND_ZEROES, "WRITE_ZEROES")
    return agreed(client, _past_end(client, ZEROES))


@check_styles(
    "read-past-end",
    ROOM,
    SHOULD,
    "Error values: EINVAL for a read past the end",
    right=("EINVAL",),
    legal=("closed",),
)
def read_past_end(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    return agreed(client, _past_end(client, READ))


@check_styles(
    "trim-past-end",
    ROOM,
    SHOULD,
    "Error values: EINVAL for a trim past the end",
    right=("EINVAL",),
    legal=("closed",),
)
def trim_past_end(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.need(o.SEND_TRIM, "TRIM")
    return agreed(client, _past_end(client, TRIM))


@check(
    "cache-past-end",
    ROOM,
    SHOULD,
    "Size constraints: EINVAL for a request past the end",
    right=("EINVAL",),
    legal=("closed",),
)
def cache_past_end(bench: Bench) -> str:
    client = bench.enter()
    client.need(o.SEND_CACHE, "CACHE")
    return agreed(client, _past_end(client, CACHE))


@check_styles(
    "misaligned",
    ROOM,
    SHOULD,
    "Size constraints: EINVAL for what is not aligned to the smallest block; where the smallest "
    "block is 1, it is served",
    right=("EINVAL", "served"),
    legal=("closed",),
)
def misaligned(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.must(Op(WRITE, SCRATCH, data=b"\x11" * 4096))
    requests = [Op(READ, 1, 512), Op(READ, 0, 511), Op(WRITE, SCRATCH + 1, data=b"\x22" * 512)]
    requests += [Op(WRITE, SCRATCH, data=b"\x22" * 100), Op(TRIM, SCRATCH + 1025, 512)]
    requests += [Op(ZEROES, SCRATCH + 2048, 100)]
    word = agreed(client, requests)
    if word == "OK":
        changed = client.read(SCRATCH, 513)
        right = changed == b"\x22" * 513 and client.minimum == 1
        return "served" if right else "wrong: a misaligned write changed something else"
    if client.read(SCRATCH, 4096) != b"\x11" * 4096:
        return "wrong: a refused request changed the data"
    return word


@check_styles(
    "unknown-command",
    ROOM,
    SHOULD,
    "Error values: EINVAL for an unknown command",
    right=("EINVAL",),
    legal=("closed",),
)
def unknown_command(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    return agreed(client, [Op(o.UNKNOWN_COMMAND, 0, 512), Op(9, 4096, 4096), Op(8, 0, 1 << 20)])


@check_styles(
    "unknown-flag",
    ROOM,
    SHOULD,
    "Error values: EINVAL for an unknown flag, and a write's payload is consumed",
    right=("EINVAL",),
    legal=("closed",),
)
def unknown_flag(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.must(Op(WRITE, SCRATCH, data=b"\x33" * 4096))
    commands = {READ, WRITE, FLUSH} | ({TRIM} if client.flags & o.SEND_TRIM else set())
    commands |= {ZEROES} if client.flags & o.SEND_ZEROES else set()
    requests = [Op(c, SCRATCH, 4096, flags=o.UNKNOWN_FLAG) for c in commands - {WRITE, FLUSH}]
    requests += [Op(WRITE, SCRATCH, data=bytes(4096), flags=o.UNKNOWN_FLAG)]
    requests += [Op(FLUSH, flags=o.UNKNOWN_FLAG)]
    word = agreed(client, requests)
    if word == "EINVAL" and client.read(SCRATCH, 4096) != b"\x33" * 4096:
        return "wrong: a refused request changed the data"
    return word


@check_styles(
    "foreign-flag",
    ROOM,
    SHOULD,
    "Error values: EINVAL for a flag that is not documented for the request",
    right=("EINVAL",),
    legal=("closed",),
)
def foreign_flag(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.must(Op(WRITE, SCRATCH, data=b"\x44" * 4096))
    requests = [
        Op(READ, 0, 4096, flags=o.NO_HOLE),
        Op(READ, 0, 4096, flags=o.REQ_ONE),
        Op(READ, 0, 4096, flags=o.FAST_ZERO),
        Op(WRITE, SCRATCH, data=bytes(4096), flags=o.DF),
        Op(WRITE, SCRATCH, data=bytes(4096), flags=o.NO_HOLE),
        Op(FLUSH, flags=o.REQ_ONE),
        Op(TRIM, SCRATCH, 4096, flags=o.NO_HOLE),
        Op(ZEROES, SCRATCH, 4096, flags=o.DF),
    ]
    word = agreed(client, requests)
    if word == "EINVAL" and client.read(SCRATCH, 4096) != b"\x44" * 4096:
        return "wrong: a refused request changed the data"
    return word


@check(
    "payload-flag-compact",
    ROOM,
    SHOULD,
    "Error values: without extended headers PAYLOAD_LEN is an unknown flag, so EINVAL",
    right=("EINVAL",),
    legal=("closed",),
)
def payload_flag_compact(bench: Bench) -> str:
    client = bench.enter()
    requests = [Op(WRITE, SCRATCH, data=bytes(512), flags=o.PAYLOAD_LEN)]
    return agreed(client, [*requests, Op(READ, 0, 512, flags=o.PAYLOAD_LEN)])


@check(
    "df-without-structured",
    ROOM,
    SHOULD,
    "Error values: DF is not applicable to a READ with simple replies, so EINVAL",
    right=("EINVAL",),
    legal=("closed",),
)
def df_without_structured(bench: Bench) -> str:
    return agreed(bench.enter(), [Op(READ, 0, 4096, flags=o.DF)])


@check(
    "status-without-structured",
    ROOM,
    SHOULD,
    "Metadata querying: EINVAL for BLOCK_STATUS where no context was selected",
    right=("EINVAL",),
    legal=("closed",),
)
def status_without_structured(bench: Bench) -> str:
    return agreed(bench.enter(), [Op(o.STATUS, 0, 4096)])


@check_styles(
    "read-only",
    ROOM,
    SHOULD,
    "Error values: EPERM for WRITE, TRIM and WRITE_ZEROES on a read-only export",
    right=("EPERM",),
    legal=("closed",),
)
def read_only(bench: Bench, style: Style) -> str:
    client = bench.enter(READ_ONLY, style=style)
    requests = [Op(WRITE, 0, data=bytes(65536)), Op(TRIM, 0, 4096), Op(ZEROES, 0, 4096)]
    return agreed(client, requests)


@check("read-only-holds", ROOM, MUST, "Transmission flags: READ_ONLY exports do not change")
def read_only_holds(bench: Bench) -> str:
    client = bench.enter(READ_ONLY)
    for op in (Op(WRITE, 0, data=bytes(4096)), Op(ZEROES, 0, 4096), Op(TRIM, 0, 4096)):
        client.word(op)
    if client.flags & o.SEND_FLUSH:
        client.must(Op(FLUSH))
    image = bench.server(READ_ONLY).place.images["disk"].read_bytes()
    return "yes" if image[: 1 << 20] == pattern("disk") else "wrong: the image changed"


@check(
    "flush-with-length",
    Feature.FLUSH_LENGTH,
    CARE,
    "FLUSH: length and offset are reserved and must be zero; a client that breaks this is told",
    right=("EINVAL",),
    legal=("closed",),
)
def flush_with_length(bench: Bench) -> str:
    client = bench.enter(PLAIN)
    client.need(o.SEND_FLUSH, "FLUSH")
    return agreed(client, [Op(FLUSH, 0, 4096), Op(FLUSH, 512), Op(FLUSH, 512, 512)])


@check(
    "oversize-write",
    ROOM,
    SHOULD,
    "Size constraints: a WRITE over the maximum payload is refused or ends the connection",
    right=("closed", "EINVAL", "ENOSPC", "EOVERFLOW", "served"),
)
def oversize_write(bench: Bench) -> str:
    client = bench.enter(Setup(size=160 * MIB))
    length = min(client.payload_most + 4096, 80 * MIB)
    word = client.word(Op(WRITE, SCRATCH, data=bytes(length)))
    in_step(client)
    return "served" if word == "OK" else word


@check_styles(
    "oversize-read",
    ROOM,
    SHOULD,
    "READ: one over the maximum payload may be served in pieces or refused",
    right=("closed", "EINVAL", "EOVERFLOW", "served"),
)
def oversize_read(bench: Bench, style: Style) -> str:
    client = bench.enter(Setup(size=160 * MIB), style=style)
    word = client.word(Op(READ, 0, 96 * MIB))
    in_step(client)
    return "served" if word == "OK" else word


@check(
    "cache-without-advertising",
    ROOM,
    CARE,
    "CACHE: clients exist that send it although it is not advertised; it does no harm",
    right=("OK", "EINVAL"),
    legal=("closed",),
)
def cache_without_advertising(bench: Bench) -> str:
    return agreed(bench.enter(), [Op(CACHE, 0, 4096)])

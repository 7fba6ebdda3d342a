"""Checks of FLUSH, FUA, TRIM, WRITE_ZEROES, CACHE, FAST_ZERO, DF and of several connections.

Not covered: whether data survive a power cut. A client sees only that a flush is answered, and that
what was written is seen afterwards by every connection and in the image file.
"""

from __future__ import annotations

from tests.blackbox import ops as o
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check, check_styles
from tests.blackbox.data import filled
from tests.blackbox.errors import agreed, in_step
from tests.blackbox.ops import CACHE, FLUSH, READ, TRIM, WRITE, ZEROES, Op
from tests.blackbox.running import DATA_BYTES, SCRATCH, pattern
from tests.blackbox.servers import MIB
from tests.blackbox.transmit import Style
from tests.blackbox.wire import AbsentError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM, HINTS, SHARED = Feature.DURABLE, Feature.HINTS, Feature.MULTI_CONN


@check_styles("flush", ROOM, MUST, "FLUSH: it is advertised and succeeds")
def flush(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.need(o.SEND_FLUSH, "FLUSH")
    client.must(Op(WRITE, SCRATCH, data=filled(1, 4096)), Op(FLUSH))
    client.must(Op(FLUSH))
    return "yes"


@check_styles("fua", ROOM, MUST, "FUA: a WRITE, TRIM and WRITE_ZEROES with FUA succeed")
def fua(bench: Bench, style: Style) -> str:
    client, data = bench.enter(style=style), filled(2, 8192)
    client.need(o.SEND_FUA, "FUA")
    client.must(Op(WRITE, SCRATCH, data=data, flags=o.FUA))
    if client.flags & o.SEND_ZEROES:
        client.must(Op(ZEROES, SCRATCH, 4096, flags=o.FUA))
        data = bytes(4096) + data[4096:]
    if client.flags & o.SEND_TRIM:
        client.must(Op(TRIM, SCRATCH + MIB, 4096, flags=o.FUA))
    return "yes" if client.read(SCRATCH, 8192) == data else "wrong: data are not as written"


@check("fua-everywhere", ROOM, MUST, "FUA: once negotiated, it is accepted on all commands")
def fua_everywhere(bench: Bench) -> str:
    client = bench.enter()
    client.need(o.SEND_FUA, "FUA")
    commands = [READ, FLUSH, TRIM, ZEROES] + ([CACHE] if client.flags & o.SEND_CACHE else [])
    words = {}
    for command in commands:
        place = (0, 0) if command == FLUSH else (SCRATCH, 4096)
        words[command] = client.word(Op(command, *place, flags=o.FUA))
    odd = {command: word for command, word in words.items() if word != "OK"}
    if odd:
        return f"refuses: {odd} by command"
    try:
        status = bench.enter(style=Style.STRUCTURED, status=True)
    except AbsentError:
        return "yes"
    status.must(Op(o.STATUS, 0, MIB, flags=o.FUA), Op(READ, 0, 4096, flags=o.FUA))
    return "yes"


@check_styles("trim", ROOM, MUST, "TRIM: it is advertised, succeeds and leaves the rest alone")
def trim(bench: Bench, style: Style) -> str:
    client, data = bench.enter(style=style), filled(3, 64 * 1024)
    client.need(o.SEND_TRIM, "TRIM")
    client.must(Op(WRITE, SCRATCH, data=data), Op(TRIM, SCRATCH + 8192, 16384))
    after = client.read(SCRATCH, len(data))
    kept = after[:8192] == data[:8192] and after[24576:] == data[24576:]
    return "yes" if kept else "wrong: the neighbours changed"


@check_styles("zeroes-command", ROOM, MUST, "WRITE_ZEROES: reads as zeroes, the rest stays")
def zeroes_command(bench: Bench, style: Style) -> str:
    client, data = bench.enter(style=style), filled(4, 64 * 1024)
    client.need(o.SEND_ZEROES, "WRITE_ZEROES")
    for flags in (0, o.NO_HOLE):
        client.must(Op(WRITE, SCRATCH, data=data), Op(ZEROES, SCRATCH + 512, 20480, flags=flags))
        expected = data[:512] + bytes(20480) + data[20992:]
        if client.read(SCRATCH, len(data)) != expected:
            return f"wrong: with flags {flags} the data are not as they should be"
    return "yes"


@check("zeroes-no-hole", ROOM, MUST, "NO_HOLE: the area is provisioned in the image file")
def zeroes_no_hole(bench: Bench) -> str:
    running = bench.fresh()
    client, image = bench.enter(running), running.place.images["disk"]
    client.need(o.SEND_ZEROES, "WRITE_ZEROES")
    before = image.stat().st_blocks
    client.must(Op(ZEROES, 16 * MIB, MIB, flags=o.NO_HOLE))
    if client.flags & o.SEND_FLUSH:
        client.must(Op(FLUSH))
    grown = (image.stat().st_blocks - before) * 512
    return "yes" if grown >= MIB else f"wrong: the file grew by {grown} of {MIB} bytes"


@check_styles(
    "zeroes-long",
    ROOM,
    SHOULD,
    "Size constraints: WRITE_ZEROES and TRIM over the maximum payload do not end the connection",
    right=("OK",),
    legal=("EINVAL", "EOVERFLOW"),
)
def zeroes_long(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.need(o.SEND_ZEROES, "WRITE_ZEROES")
    client.must(Op(WRITE, 40 * MIB, data=b"\x55" * 4096))
    word = agreed(client, [Op(ZEROES, 16 * MIB, 40 * MIB), Op(TRIM, 16 * MIB, 40 * MIB)])
    if word == "OK" and client.read(40 * MIB, 4096).strip(b"\0"):
        return "wrong: data are left"
    return word


@check("cache", HINTS, MAY, "CACHE: it is advertised and succeeds")
def cache(bench: Bench) -> str:
    client = bench.enter()
    client.need(o.SEND_CACHE, "CACHE")
    client.must(Op(CACHE, 0, MIB), Op(CACHE, client.size - 4096, 4096))
    return "yes" if client.read(0, MIB) == pattern("disk") else "wrong"


@check(
    "cache-flags",
    HINTS,
    MUST,
    "CACHE: where it is advertised, flags that the server does not know are rejected",
    right=("EINVAL",),
    legal=("closed",),
)
def cache_flags(bench: Bench) -> str:
    client = bench.enter()
    client.need(o.SEND_CACHE, "CACHE")
    return agreed(client, [Op(CACHE, 0, 4096, flags=1 << bit) for bit in (1, 4, 5, 9, 15)])


@check(
    "fast-zero",
    HINTS,
    MUST,
    "FAST_ZERO: done, or ENOTSUP without changing anything; and nothing else fails with ENOTSUP",
    right=("OK", "ENOTSUP"),
)
def fast_zero(bench: Bench) -> str:
    client = bench.enter()
    client.need(o.SEND_FAST_ZERO, "FAST_ZERO")
    data = filled(6, 64 * 1024)
    client.must(Op(WRITE, SCRATCH, data=data))
    word = client.word(Op(ZEROES, SCRATCH, 65536, flags=o.FAST_ZERO))
    expected = bytes(65536) if word == "OK" else data
    if client.read(SCRATCH, 65536) != expected:
        return f"wrong: after {word} the data are not as they should be"
    client.must(Op(ZEROES, SCRATCH, 65536), Op(ZEROES, SCRATCH, 4096, flags=o.NO_HOLE))
    mixed = client.word(Op(ZEROES, SCRATCH, 4096, flags=o.FAST_ZERO | o.NO_HOLE))
    return word if mixed in {"OK", "ENOTSUP"} else f"wrong: {mixed} with NO_HOLE"


@check(
    "fast-zero-unadvertised",
    HINTS,
    SHOULD,
    "WRITE_ZEROES: EINVAL for FAST_ZERO where it is not advertised",
    right=("EINVAL", "advertised"),
    legal=("closed",),
)
def fast_zero_unadvertised(bench: Bench) -> str:
    client = bench.enter()
    client.need(o.SEND_ZEROES, "WRITE_ZEROES")
    if client.flags & o.SEND_FAST_ZERO:
        return "advertised"
    return agreed(client, [Op(ZEROES, SCRATCH, 4096, flags=o.FAST_ZERO)])


def _advertises_df(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    client.need(o.SEND_DF, "DF")
    border = DATA_BYTES - 32768
    requests = [Op(READ, border, 65536, flags=o.DF), Op(READ, 0, 65536, flags=o.DF)]
    requests += [Op(READ, 2 * MIB, 65536, flags=o.DF)]
    image = pattern("disk") + bytes(4 * MIB)
    for op, answer in zip(requests, client.do(*requests), strict=True):
        if answer.error:
            return f"refuses: {op.length} bytes at {op.offset}"
        if answer.data != image[op.offset : op.offset + op.length]:
            return "wrong: the data"
    in_step(client)
    return "yes"


@check("df", HINTS, MUST, "DF: a READ of up to 65,536 bytes comes in one chunk, holes as zeroes")
def df(bench: Bench) -> str:
    return _advertises_df(bench, Style.STRUCTURED)


@check("extended-df", Feature.EXTENDED, MUST, "DF: the same with extended headers")
def extended_df(bench: Bench) -> str:
    return _advertises_df(bench, Style.EXTENDED)


@check(
    "df-long",
    HINTS,
    MUST,
    "DF: a long READ comes in one chunk or fails with EOVERFLOW",
    right=("OK", "EOVERFLOW"),
)
def df_long(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED)
    client.need(o.SEND_DF, "DF")
    word = client.word(Op(READ, 0, 4 * MIB, flags=o.DF))
    in_step(client)
    return word


@check("multi-conn", SHARED, MAY, "CAN_MULTI_CONN: it is advertised on a writable export")
def multi_conn(bench: Bench) -> str:
    bench.enter().need(o.MULTI_CONN, "MULTI_CONN")
    return "yes"


@check(
    "multi-conn-flush",
    SHARED,
    MUST,
    "CAN_MULTI_CONN: what one connection wrote, another one's FLUSH makes visible to all",
)
def multi_conn_flush(bench: Bench) -> str:
    writer, flusher, reader = bench.enter(), bench.enter(), bench.enter()
    writer.need(o.MULTI_CONN, "MULTI_CONN")
    for turn in range(20):
        data, place = filled(turn, 4096), SCRATCH + turn * 4096
        reader.read(place, 4096)
        writer.must(Op(WRITE, place, data=data))
        flusher.must(Op(FLUSH))
        if reader.read(place, 4096) != data:
            return "wrong: after a FLUSH elsewhere, a connection reads old data"
        with bench.server().place.images["disk"].open("rb") as file:
            file.seek(place)
            if file.read(4096) != data:
                return "wrong: after another connection's FLUSH, the file has old data"
    return "yes"


@check("multi-conn-many", SHARED, MAY, "Several connections are served at the same time")
def multi_conn_many(bench: Bench) -> str:
    clients = [bench.enter() for _ in range(16)]
    cookies = [client.send(Op(READ, n * 4096, 4096)) for n, client in enumerate(clients)]
    for number, (client, sent) in enumerate(zip(clients, cookies, strict=True)):
        answer = client.collect(sent)[sent[0]]
        if answer.data != pattern("disk")[number * 4096 : (number + 1) * 4096]:
            return f"wrong: the data of connection {number}"
    return "yes"

"""Checks of READ, WRITE and DISC, of pipelines and of long requests; and of an orderly stop.

Not covered: errors (`errors`), what survives a power cut, which no client can see.
"""

from __future__ import annotations

import signal
import struct

from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check, check_styles
from tests.blackbox.ops import DISC, ERRORS, READ, STATUS, TRIM, WRITE, ZEROES, Op
from tests.blackbox.running import DATA_BYTES, SCRATCH, pattern
from tests.blackbox.servers import MIB
from tests.blackbox.transmit import Style
from tests.blackbox.wire import AbsentError, ClosedError, SilentError, ViolationError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM = Feature.READ_WRITE
KIB = 1 << 10


def filled(number: int, length: int) -> bytes:
    """Return bytes that tell one request from another."""
    return (b"%07d " % number) * (length // 8)


@check_styles("read", ROOM, MUST, "READ: the data of the image, at any offset, holes as zeroes")
def read(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    image = pattern("disk") + bytes(2 * MIB)
    places = [(0, 512), (512, 65536), (DATA_BYTES - 4096, 8192), (DATA_BYTES, MIB), (0, 2 * MIB)]
    places += [(client.size - 4096, 4096)]
    for (offset, length), answer in zip(
        places, client.do(*(Op(READ, *place) for place in places)), strict=True
    ):
        expected = image[offset : offset + length] if offset < 2 * MIB else bytes(length)
        if answer.error or answer.data != expected:
            word = ERRORS[answer.error] if answer.error else "wrong data"
            raise ViolationError(f"READ of {length} at {offset}: {word}")
    client.leave()
    return "yes"


@check_styles("write", ROOM, MUST, "WRITE: the data are on the disk, for every connection")
def write(bench: Bench, style: Style) -> str:
    client, other = bench.enter(style=style), bench.enter(style=style)
    for number, length in enumerate((512, 4096, 65536, MIB)):
        data = filled(number, length)
        client.must(Op(WRITE, SCRATCH + 512, data=data))
        if client.read(SCRATCH + 512, length) != data:
            return f"wrong: {length} bytes are not as written"
        if other.read(SCRATCH + 512, length) != data:
            return f"wrong: another connection does not see {length} bytes"
    return "yes"


@check_styles("pipeline", ROOM, MUST, "Transmission: replies come in any order, with the cookie")
def pipeline(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    writes = [Op(WRITE, SCRATCH + n * 8192, data=filled(n, 8192)) for n in range(64)]
    client.must(*writes)
    reads = [Op(READ, SCRATCH + n * 8192, 8192) for n in range(64)]
    for number, answer in enumerate(client.do(*reads)):
        if answer.error or answer.data != writes[number].data:
            return f"wrong: the {number}-th of 64 pipelined reads"
    return "yes"


@check("cookies", ROOM, MUST, "Transmission: the cookie is opaque and comes back unchanged")
def cookies(bench: Bench) -> str:
    client = bench.enter()
    for cookie in (0, (1 << 64) - 1, 0x67446698_67446698, 1):
        client.next_cookie = cookie
        client.read(0, 512)
    return "yes"


@check("request-in-pieces", ROOM, MUST, "Transmission: requests may come in any pieces")
def request_in_pieces(bench: Bench) -> str:
    client, data = bench.enter(), filled(7, 512)
    for byte in client.pack(Op(WRITE, SCRATCH, data=data)):
        client.wire.send(bytes([byte]))
    _, answer = client.receive()
    return "yes" if not answer.error and client.read(SCRATCH, 512) == data else "wrong"


@check_styles("long", ROOM, SHOULD, "Size constraints: payloads of 32 MiB are not refused")
def long(bench: Bench, style: Style) -> str:
    client, data = bench.enter(style=style), filled(9, 32 * MIB)
    client.must(Op(WRITE, 24 * MIB, data=data))
    return "yes" if client.read(24 * MIB, 32 * MIB) == data else "wrong: not as written"


@check_styles("no-bytes", ROOM, SHOULD, "Requests: a length of 0 is unspecified, but no hang-up")
def no_bytes(bench: Bench, style: Style) -> str:
    client = bench.enter(style=style)
    words = [client.word(Op(command, 4096)) for command in (READ, WRITE, TRIM, ZEROES)]
    if style is not Style.SIMPLE:
        words.append(bench.enter(style=style, status=True).word(Op(STATUS, 4096)))
    if client.read(0, 4096) != pattern("disk")[:4096]:
        return "wrong: the data changed"
    return f"yes: {' '.join(words)}"


@check("disc", Feature.DISC, MUST, "DISC: the server closes the connection, without a reply")
def disc(bench: Bench) -> str:
    bench.enter().disc()
    client = bench.enter()
    client.read(0, 4096)
    client.disc()
    return "yes"


@check_styles(
    "disc-in-flight",
    Feature.DISC,
    MUST,
    "DISC: the server must handle all outstanding requests before it closes",
)
def disc_in_flight(bench: Bench, style: Style) -> str:
    for turn in range(5):
        client = bench.enter(style=style)
        place = SCRATCH + turn * 4 * MIB
        writes = [Op(WRITE, place + n * 65536, data=filled(n, 65536)) for n in range(32)]
        reads = [Op(READ, n * 65536, 65536) for n in range(16)]
        wanted = client.send(*writes, *reads, Op(DISC))[:-1]
        words = []
        try:
            for _ in wanted:
                words.append(ERRORS[client.receive()[1].error])
        except ClosedError:
            return f"drops: {len(words)} of {len(wanted)} were answered before it closed"
        if failed := [word for word in words if word != "OK"]:
            return f"fails: {len(failed)} of {len(wanted)} with {', '.join(sorted(set(failed)))}"
        if rest := client.wire.rest():
            raise ViolationError(f"{len(rest)} bytes come after the last reply")
        if bench.enter().read(place + 31 * 65536, 65536) != writes[31].data:
            return "loses: the data of a write that was answered"
    return "yes"


@check(
    "disc-then-write",
    Feature.DISC,
    CARE,
    "DISC: a client must send nothing behind it, and what it sends is not carried out",
)
def disc_then_write(bench: Bench) -> str:
    client = bench.enter()
    client.must(Op(WRITE, SCRATCH, data=filled(1, 4096)))
    client.send(Op(DISC), Op(WRITE, SCRATCH, data=filled(2, 4096)))
    client.wire.rest()
    return "yes" if bench.enter().read(SCRATCH, 4096) == filled(1, 4096) else "carried out"


@check(
    "stop-in-flight",
    Feature.STOP,
    SHOULD,
    "Terminating the transmission phase: a server that stops serves what is in flight, or answers "
    "it with ESHUTDOWN",
)
def stop_in_flight(bench: Bench) -> str:
    running = bench.fresh()
    client = bench.enter(running)
    ops = [Op(WRITE, SCRATCH + n * 65536, data=filled(n, 65536)) for n in range(64)]
    client.send(*ops)
    words = [ERRORS[client.receive()[1].error]]
    running.signal(signal.SIGTERM)
    try:
        while len(words) < len(ops):
            words.append(ERRORS[client.receive()[1].error])
    except ClosedError:
        pass
    odd = set(words) - {"OK", "ESHUTDOWN"}
    if odd:
        raise ViolationError(f"requests in flight at a stop fail with {sorted(odd)}")
    client.wire.close()
    if not running.wait(5):
        return "hangs: it does not end within 5 s"
    if len(words) < len(ops):
        return f"drops: {len(words)} of {len(ops)} were answered"
    return "yes" if running.ending() in {"exit 0", "ended"} else f"wrong: {running.ending()}"


@check("stop-idle", Feature.STOP, CARE, "A client that is idle does not keep a server from ending")
def stop_idle(bench: Bench) -> str:
    running = bench.fresh()
    client, haggle = bench.enter(running), bench.haggle(running)
    client.read(0, 4096)
    running.signal(signal.SIGTERM)
    if not running.wait(5):
        return "hangs: it does not end within 5 s"
    if running.ending() not in {"exit 0", "ended"}:
        return f"wrong: {running.ending()}"
    try:
        rest = client.wire.rest() + haggle.wire.rest()
    except SilentError:
        return "hangs: a connection is left open"
    return f"wrong: {len(rest)} bytes nobody asked for" if rest else "yes"


@check(
    "compact-request-magic",
    ROOM,
    MAY,
    "Terminating the transmission phase: a wrong magic is a violation, so the server may hang up",
    right=("closed",),
    legal=("answers",),
)
def compact_request_magic(bench: Bench) -> str:
    for magic in (0x25609514, 0x12560953, 0x21E41C71):
        client = bench.enter()
        client.wire.send(struct.pack(">I", magic) + client.pack(Op(READ, 0, 512))[4:] + bytes(4))
        if said := client.wire.rest():
            return f"answers: {said[:20].hex()}"
    return "closed"


@check("image-holds-writes", ROOM, CARE, "After a FLUSH the image file holds what was written")
def image_holds_writes(bench: Bench) -> str:
    client, data = bench.enter(), filled(5, 64 * KIB)
    client.must(Op(WRITE, SCRATCH, data=data))
    if not client.flags & 4:
        raise AbsentError("FLUSH is not advertised")
    client.must(Op(3))
    with bench.server().place.images["disk"].open("rb") as file:
        file.seek(SCRATCH)
        return "yes" if file.read(len(data)) == data else "wrong"

"""Attacks on a server in transmission: lengths near 2^32, payloads that never come, no reading.

Not covered: what is in `attacks_early`.
"""

from __future__ import annotations

import time

from tests.blackbox import haggle as h
from tests.blackbox import ops as o
from tests.blackbox.attacks_early import GROWTH_MOST, ends, grown
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.ops import READ, STATUS, WRITE, ZEROES, Op
from tests.blackbox.running import SCRATCH
from tests.blackbox.servers import BIG, MIB
from tests.blackbox.transmit import Style
from tests.blackbox.wire import AbsentError, ClosedError, SilentError

CARE, MUST = Level.CARE, Level.MUST
ROOM = Feature.ATTACKS
NEAR_2_32 = (0xFFFFFFFF, 0xFFFFFE00, 0xFFFFF000, 0xFFFF0000, 0x80000000, 0x7FFFFE00)


def _long_status(bench: Bench, style: Style, flags: int) -> str:
    client = bench.enter(BIG, style=style, status=True)
    for length in NEAR_2_32:
        for offset in (0, 512, MIB, client.size - 0x100000000):
            word = client.word(Op(STATUS, offset, length, flags=flags))
            if word not in {"OK", "EINVAL"}:
                return f"wrong: {word} for {length:#x} bytes at {offset:#x}"
    return bench.survives(BIG)


@check(
    "CVE-2025-47711",
    ROOM,
    MUST,
    "BLOCK_STATUS with lengths near 2^32: the extents keep the rules",
    right=("survives",),
)
def long_status(bench: Bench) -> str:
    return _long_status(bench, Style.STRUCTURED, 0)


@check(
    "CVE-2025-47712",
    ROOM,
    MUST,
    "BLOCK_STATUS with lengths near 2^32 and REQ_ONE, and from odd places",
    right=("survives",),
)
def long_status_one(bench: Bench) -> str:
    return _long_status(bench, Style.STRUCTURED, o.REQ_ONE)


@check(
    "extended-long-status",
    Feature.EXTENDED,
    MUST,
    "BLOCK_STATUS with lengths near 2^32 and extended headers",
    right=("survives",),
)
def extended_long_status(bench: Bench) -> str:
    _long_status(bench, Style.EXTENDED, 0)
    return _long_status(bench, Style.EXTENDED, o.REQ_ONE)


@check(
    "lengths-near-2-32",
    ROOM,
    CARE,
    "Requests of every kind with lengths near 2^32 end in an error or at once",
    right=("survives",),
    seconds=15.0,
)
def lengths_near_2_32(bench: Bench) -> str:
    before = bench.server().memory()
    for command in (READ, o.TRIM, o.CACHE, ZEROES, STATUS, 0x99):
        for length in NEAR_2_32[:3]:
            client = bench.enter()
            try:
                client.waiting.clear()
                client.send(Op(command, 512, length))
                client.wire.take(16)
            except ClosedError:
                continue
    bench.survives()
    return grown(bench, before)


@check(
    "payload-never-comes",
    ROOM,
    CARE,
    "Writes that announce up to 4 GiB and send nothing: nobody waits, and no memory is taken",
    right=("survives",),
    seconds=20.0,
)
def payload_never_comes(bench: Bench) -> str:
    before = bench.server().memory()
    clients = []
    for length in (0xFFFFFFFF, 0x80000000, 32 * MIB, 32 * MIB, 32 * MIB, 65536):
        client = bench.enter()
        client.wire.send(client.pack(Op(WRITE, SCRATCH, length)) + bytes(4096))
        clients.append(client)
    bench.survives()
    word = grown(bench, before)
    for client in clients:
        ends(client.wire)
    bench.survives()
    return word


@check(
    "never-reads",
    ROOM,
    CARE,
    "A client that asks for 1 GiB and reads nothing: nobody waits, and memory stays bounded",
    right=("survives",),
    seconds=20.0,
)
def never_reads(bench: Bench) -> str:
    before = bench.server().memory()
    client = bench.enter()
    requests = b"".join(client.pack(Op(READ, 0, MIB)) for _ in range(1024))
    client.wire.push(requests, 1.0)
    end, peak = time.monotonic() + 1.0, 0
    while time.monotonic() < end:
        peak = max(peak, bench.server().memory())
        time.sleep(0.05)
    bench.survives()
    client.wire.close()
    bench.survives()
    growth = peak - before
    return f"grows: by {growth // MIB} MiB" if growth > 2 * GROWTH_MOST else "survives"


@check(
    "slow-clients",
    ROOM,
    CARE,
    "Clients that stop in the middle of an option, a header and a payload keep nobody waiting",
    right=("survives",),
)
def slow_clients(bench: Bench) -> str:
    for end in (3, 12, 20):
        bench.haggle().wire.send(h.pack_option(h.GO, h.go_data(b"disk"))[:end])
    for end in (1, 27, 28, 1000):
        client = bench.enter()
        client.wire.send(client.pack(Op(WRITE, SCRATCH, data=bytes(4096)))[:end])
    return bench.survives()


@check(
    "payload-cut",
    ROOM,
    CARE,
    "A connection cut in the middle of a payload changes nothing behind what it sent",
    right=("survives",),
)
def payload_cut(bench: Bench) -> str:
    good = bench.enter()
    good.must(Op(WRITE, SCRATCH, data=b"\x66" * 65536))
    client = bench.enter()
    client.wire.send(client.pack(Op(WRITE, SCRATCH, data=b"\x99" * 65536))[: 28 + 32768])
    ends(client.wire)
    if good.read(SCRATCH + 32768, 32768) != b"\x66" * 32768:
        return "wrong: data behind the cut changed"
    return bench.survives()


@check(
    "garbage",
    ROOM,
    CARE,
    "Noise instead of options and requests ends the connection, and nothing else",
    right=("survives",),
    seconds=20.0,
)
def garbage(bench: Bench) -> str:
    noise = bytes((n * 197 + 31) & 0xFF for n in range(4096))
    for turn in range(10):
        for wire in (bench.haggle().wire, bench.enter().wire):
            try:
                wire.push(noise[turn * 100 :], 1.0)
                wire.half_close()
                wire.rest()
            except ClosedError:
                continue
            except SilentError:
                return "hangs: on noise, though the client closed"
            except OSError as error:
                raise AbsentError(f"the connection cannot be closed: {error}") from error
    return bench.survives()

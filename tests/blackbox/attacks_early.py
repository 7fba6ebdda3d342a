"""Attacks on a server before transmission; each has broken a server once, hence the CVE's number.

An attack is survived when a good client is served quickly afterwards and meanwhile, and when the
attacking connection ends or waits without costing memory.

Not covered: CVE-2021-3716, which is in `tls`; a hostile server upstream, which is in `upstream`.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator

from tests.blackbox import haggle as h
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.ops import READ, Op
from tests.blackbox.servers import MIB, NAMED, PLAIN, Setup
from tests.blackbox.transmit import enter
from tests.blackbox.wire import AbsentError, ClosedError, SilentError, ViolationError, Wire

CARE, MUST = Level.CARE, Level.MUST
ROOM = Feature.ATTACKS
GROWTH_MOST = 128 * MIB
"""Bytes that an attack may make a server hold: a few requests of 32 MiB."""


def grown(bench: Bench, before: int, on: Setup = PLAIN) -> str:
    """Return "survives", or "grows" when the shared server holds much more than before."""
    growth = bench.server(on).memory() - before
    return f"grows: by {growth // MIB} MiB" if growth > GROWTH_MOST else "survives"


def ends(wire: Wire) -> None:
    """A connection whose client says no more must end; otherwise a Violation."""
    wire.half_close()
    try:
        wire.rest()
    except SilentError as error:
        raise ViolationError("the attacking connection hangs, though it was closed") from error


@check(
    "option-cap",
    Feature.CAP,
    CARE,
    "Termination during haggling: endless options are a denial of service; a server may hang up",
    right=("capped",),
    seconds=15.0,
)
def option_cap(bench: Bench) -> str:
    haggle = bench.haggle()
    for count in range(5000):
        try:
            haggle.ask(h.UNKNOWN_OPTION)
        except ClosedError:
            bench.survives()
            return f"capped: after {count} options"
    return "none: 5000 options were answered"


@check(
    "CVE-2019-14850",
    ROOM,
    CARE,
    "Clients that connect and say nothing keep nobody waiting",
    right=("survives",),
)
def idle_clients(bench: Bench) -> str:
    before = bench.server().memory()
    for _ in range(20):
        bench.wire()
        h.Haggle(bench.wire())
        bench.haggle()
    bench.survives()
    return grown(bench, before)


def _orders() -> Iterator[list[tuple[int, bytes]]]:
    meta = h.meta_data(b"disk", b"base:allocation")
    info = (h.INFO, h.go_data(b"disk", (3,)))
    structured, lists, sets = (h.STRUCTURED_REPLY, b""), (h.LIST_META, meta), (h.SET_META, meta)
    yield [info, info, (h.LIST, b""), structured, info]
    yield [structured, sets, info, lists, structured, (h.LIST, b"")]
    yield [lists, sets, structured, lists, lists, info, sets]
    yield [(h.INFO, h.go_data(b"nix")), structured, (h.SET_META, h.meta_data(b"nix", b"base:x"))]
    yield [(h.EXTENDED_HEADERS, b""), sets, info, lists, (h.LIST, b"x")]
    yield [(h.STARTTLS, b""), info, (h.STARTTLS, b""), structured, (h.PEEK_EXPORT, b"")]


@check(
    "CVE-2019-14851",
    ROOM,
    MUST,
    "Options in odd order, then GO: the export is served all the same",
    right=("survives",),
)
def odd_order(bench: Bench) -> str:
    for order in _orders():
        haggle = bench.haggle()
        for option, data in order:
            haggle.ask(option, data)
        client = enter(haggle, "disk")
        client.read(0, 4096)
        client.leave()
    return bench.survives()


@check(
    "CVE-2022-26495",
    ROOM,
    CARE,
    "Lengths of 0xffffffff in options and names",
    right=("survives",),
    seconds=30.0,
)
def length_of_ffffffff(bench: Bench) -> str:
    before = bench.server(NAMED).memory()
    for option in (h.EXPORT_NAME, h.INFO, h.GO, h.LIST_META, h.SET_META, h.UNKNOWN_OPTION):
        for length in (0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x80000000):
            haggle = bench.haggle(NAMED)
            _try_send(haggle, option, b"\xff" * 64, length)
            ends(haggle.wire)
    bench.survives(NAMED)
    return grown(bench, before, NAMED)


def _try_send(haggle: h.Haggle, option: int, data: bytes, length: int | None = None) -> None:
    if option in {h.LIST_META, h.SET_META}:
        haggle.ask(h.STRUCTURED_REPLY)
    haggle.send(option, data, length=length)


@check(
    "CVE-2022-26496",
    ROOM,
    MUST,
    "Names that end far behind the option's data are refused, not read",
    right=("survives",),
    seconds=30.0,
)
def name_behind_data(bench: Bench) -> str:
    for option in (h.INFO, h.GO, h.LIST_META, h.SET_META):
        for length in (0xFFFFFFFF, 0xFFFFFFFA, 0x7FFFFFFF, 0x10000, 5000, 60):
            haggle = bench.haggle(NAMED)
            _try_send(haggle, option, struct.pack(">I", length) + bytes(50))
            try:
                word = haggle.replies(option)[-1].word
            except ClosedError:
                continue
            except SilentError:
                return f"hangs: a name of {length:#x} bytes in option {option}"
            if word == "ACK":
                return f"accepts: a name of {length:#x} bytes in 54"
    return bench.survives(NAMED)


@check(
    "CVE-2013-7441",
    ROOM,
    CARE,
    "Connections closed at every byte of the negotiation, and unknown exports",
    right=("survives",),
    seconds=20.0,
)
def closed_anywhere(bench: Bench) -> str:
    options = [(h.LIST, b""), (h.INFO, h.go_data(b"nix")), (h.GO, h.go_data(b"alpha", (3,)))]
    stream = bytes([0, 0, 0, 3]) + b"".join(h.pack_option(*option) for option in options)
    for end in range(0, len(stream) + 1, 2):
        wire = bench.wire(NAMED)
        h.Haggle(wire)
        wire.send(stream[:end])
        wire.close()
    for name in (b"nix", b"", b"alph"):
        haggle = bench.haggle(NAMED)
        haggle.send(h.EXPORT_NAME, name)
        haggle.wire.close()
    return bench.survives(NAMED)


@check(
    "CVE-2017-7539",
    ROOM,
    CARE,
    "Data and aborts where none are due",
    right=("survives",),
    seconds=20.0,
)
def data_where_none_is_due(bench: Bench) -> str:
    for option in (h.ABORT, h.LIST, h.STRUCTURED_REPLY, h.STARTTLS, h.EXTENDED_HEADERS, 0, 4):
        haggle = bench.haggle()
        haggle.send(option, b"\xa5" * 500)
        try:
            haggle.replies(option)
            haggle.send(h.ABORT)
            ends(haggle.wire)
        except ClosedError:
            continue
        except SilentError:
            return f"hangs: at option {option} with data"
    haggle = bench.haggle()
    haggle.wire.send(h.pack_option(h.ABORT) * 50)
    ends(haggle.wire)
    return bench.survives()


@check(
    "CVE-2017-10664",
    ROOM,
    CARE,
    "Clients that go away without reading their replies",
    right=("survives",),
)
def goes_without_reading(bench: Bench) -> str:
    for _ in range(30):
        haggle = bench.haggle()
        haggle.wire.send(h.pack_option(h.LIST) * 10 + h.pack_option(h.ABORT))
        haggle.wire.close()
        client = bench.enter()
        client.send(*(Op(READ, n * 65536, 65536) for n in range(16)))
        client.wire.close()
    return bench.survives()


@check(
    "gone-at-export-name",
    ROOM,
    CARE,
    "Clients that go away between EXPORT_NAME, or GO, and its answer",
    right=("survives",),
)
def gone_at_export_name(bench: Bench) -> str:
    for _ in range(20):
        for option, data in ((h.EXPORT_NAME, b"alpha"), (h.GO, h.go_data(b"alpha", (3,)))):
            haggle = bench.haggle(NAMED)
            haggle.send(option, data)
            haggle.wire.close()
    return bench.survives(NAMED)


@check(
    "CVE-2017-15118",
    ROOM,
    MUST,
    "A name of 3000 bytes is merely unknown",
    right=("survives",),
)
def name_of_3000(bench: Bench) -> str:
    name = b"n" * 3000
    for option in (h.INFO, h.GO):
        word = bench.haggle(NAMED).word(option, h.go_data(name, (3,)))
        if word not in {"ERR_UNKNOWN", "ERR_INVALID", "ERR_TOO_BIG"}:
            return f"accepts: {word}"
    for option in (h.LIST_META, h.SET_META):
        haggle = bench.haggle(NAMED)
        haggle.ask(h.STRUCTURED_REPLY)
        haggle.ask(option, h.meta_data(name, b"base:allocation"))
        haggle.ask(option, h.meta_data(b"alpha", b"base:" + name))
    haggle = bench.haggle(NAMED)
    haggle.send(h.EXPORT_NAME, name)
    if haggle.wire.rest():
        return "accepts: EXPORT_NAME of 3000 bytes"
    return bench.survives(NAMED)


@check(
    "CVE-2017-15119",
    ROOM,
    CARE,
    "Huge options are not read to their end, however long the client sends",
    right=("survives",),
    seconds=20.0,
)
def huge_options(bench: Bench) -> str:
    before, peak = bench.server().memory(), 0
    for length in (0xFFFFFFF0, 0x40000000):
        haggle = bench.haggle()
        haggle.send(h.UNKNOWN_OPTION, length=length)
        for count in range(64):
            try:
                haggle.wire.push(bytes(MIB), 1.0)
            except ClosedError:
                break
            peak = max(peak, bench.server().memory())
            if count == 10:
                bench.survives()
        else:
            return "swallows: 64 MiB of an option"
    growth = peak - before
    bench.survives()
    return f"grows: by {growth // MIB} MiB" if growth > GROWTH_MOST else "survives"


@check(
    "CVE-2017-9524",
    ROOM,
    CARE,
    "Clients that come before the export is ready are served, kept waiting or refused",
    right=("survives",),
    seconds=30.0,
)
def before_ready(bench: Bench) -> str:
    running = bench.launch()
    met = 0
    while met < 20 and not running.gave_up():
        bench.clock.left()
        try:
            haggle = bench.haggle(running)
            if met % 2:
                haggle.send(h.GO, h.go_data(b"disk"))
            else:
                enter(haggle, "disk").read(0, 4096)
        except ClosedError:
            continue
        met += 1
    running.started()
    return bench.survives(running)


@check(
    "CVE-2020-10761",
    ROOM,
    MUST,
    "An unknown name of 4096 bytes, which an error's text cannot hold",
    right=("survives",),
)
def echoed_name(bench: Bench) -> str:
    for length in (4096, 4095, 4000):
        for option in (h.INFO, h.GO):
            word = bench.haggle(NAMED).word(option, h.go_data(b"\xc3\xa4" * (length // 2)))
            if word == "ACK":
                return f"accepts: {word}"
    return bench.survives(NAMED)


@check(
    "CVE-2024-7409",
    ROOM,
    CARE,
    "Many half-negotiated clients while the server stops: it ends, and in order",
    right=("survives",),
    seconds=15.0,
)
def stop_half_negotiated(bench: Bench) -> str:
    running = bench.fresh()
    for number in range(60):
        if number % 3 == 0:
            bench.wire(running)
        elif number % 3 == 1:
            bench.haggle(running).wire.send(h.pack_option(h.GO, b"12345", length=500))
        else:
            bench.haggle(running).exports()
    running.signal(signal.SIGTERM)
    if not running.wait(5):
        return "hangs: it does not end within 5 s"
    ending = running.ending()
    return "survives" if ending in {"exit 0", "ended"} else f"wrong: {ending}"


@check(
    "connection-flood",
    ROOM,
    CARE,
    "300 connections at once, half of them silent, keep nobody waiting",
    right=("survives",),
    seconds=20.0,
)
def connection_flood(bench: Bench) -> str:
    before = bench.server().memory()
    for _ in range(150):
        try:
            bench.wire()
            bench.haggle()
        except (ClosedError, SilentError) as error:
            raise AbsentError(f"connections are refused: {error}") from error
    bench.survives()
    growth = bench.server().memory() - before
    return f"survives: {growth // 300 // 1024} KiB for each" if growth < 1 << 30 else "grows"

"""Checks of INFO and GO: what is told of an export, and names that are odd or wrong.

Not covered: what the transmission flags promise; see `data`, `durable` and `structured`.
"""

from __future__ import annotations

import contextlib
import struct

from tests.blackbox import haggle as h
from tests.blackbox import ops
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.handshake import in_step, served
from tests.blackbox.servers import MIB, NAMED, PLAIN, READ_ONLY
from tests.blackbox.transmit import Style, Transmission
from tests.blackbox.wire import AbsentError, ClosedError, SilentError, ViolationError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM = Feature.GO
ALL_KINDS = (h.INFO_EXPORT, h.INFO_NAME, h.INFO_DESCRIPTION, h.INFO_BLOCK_SIZE)


def told(bench: Bench, *requests: int) -> h.Export:
    """Return what INFO tells of the named export."""
    word, export = bench.haggle(NAMED).describe(h.INFO, "alpha", requests)
    if word != "ACK":
        raise AbsentError(f"INFO is answered with {word}")
    return export


@check("info", ROOM, MUST, "Baseline: INFO answers with INFO_EXPORT and ACK, and haggling goes on")
def info(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    word, export = haggle.describe(h.INFO, "alpha")
    if word != "ACK":
        raise AbsentError(f"INFO is answered with {word}")
    in_step(haggle)
    if len(set(export.kinds)) < len(export.kinds):
        raise ViolationError(f"a kind of information came twice: {export.kinds}")
    return "yes" if export.size == NAMED.size else f"wrong size: {export.size}"


@check("go", ROOM, MUST, "Baseline: GO answers as INFO does, and transmission begins")
def go(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    word, export = haggle.describe(h.GO, "alpha")
    if word != "ACK":
        raise AbsentError(f"GO is answered with {word}")
    if export.size != NAMED.size:
        return f"wrong size: {export.size}"
    return served(Transmission(haggle, export), "alpha")


@check("info-then-go", ROOM, MUST, "INFO and GO: GO after INFO of the same tells the same")
def info_then_go(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    _, first = haggle.describe(h.INFO, "alpha", ALL_KINDS)
    word, second = haggle.describe(h.GO, "alpha", ALL_KINDS)
    if word != "ACK":
        return word
    first.kinds.sort()
    second.kinds.sort()
    return "yes" if first == second else f"differs: INFO {first}, GO {second}"


@check("info-name", ROOM, MAY, "INFO_NAME: the canonical name, when asked for")
def info_name(bench: Bench) -> str:
    export = told(bench, h.INFO_NAME)
    if export.name is None:
        raise AbsentError("INFO_NAME is not sent")
    return "yes" if export.name == "alpha" else f"wrong: {export.name}"


@check("info-description", ROOM, MAY, "INFO_DESCRIPTION: for display to a human being")
def info_description(bench: Bench) -> str:
    if told(bench, h.INFO_DESCRIPTION).description is None:
        raise AbsentError("INFO_DESCRIPTION is not sent")
    return "yes"


@check("info-block-size", ROOM, MUST, "Size constraints: powers of two, in order, within limits")
def info_block_size(bench: Bench) -> str:
    sizes = told(bench, h.INFO_BLOCK_SIZE).block_sizes
    if sizes is None:
        raise AbsentError("INFO_BLOCK_SIZE is not sent")
    least, preferred, most = sizes
    if least not in [1 << bit for bit in range(17)]:
        return f"wrong: the minimum is {least}"
    if preferred & (preferred - 1) or preferred < max(least, 512):
        return f"wrong: {preferred} is preferred over a minimum of {least}"
    return f"yes: {least}/{preferred}/{most}" if most >= preferred else f"wrong: {sizes}"


@check("block-size-fits-qemu", ROOM, CARE, "QEMU wants blocks of at most 512 and 32 MiB payload")
def block_size_fits_qemu(bench: Bench) -> str:
    sizes = told(bench, h.INFO_BLOCK_SIZE).block_sizes or (1, 4096, ops.PAYLOAD_MOST)
    return "yes" if sizes[0] <= 512 and sizes[2] >= ops.PAYLOAD_MOST else f"wrong: {sizes}"


@check("go-without-sizes", ROOM, SHOULD, "Size constraints: a client need not ask for sizes")
def go_without_sizes(bench: Bench) -> str:
    haggle = bench.haggle()
    word, export = haggle.describe(h.GO, "disk")
    return served(Transmission(haggle, export)) if word == "ACK" else word


@check("info-unknown-kind", ROOM, MUST, "INFO and GO: unknown information requests are ignored")
def info_unknown_kind(bench: Bench) -> str:
    word, _ = bench.haggle(NAMED).describe(h.INFO, "alpha", (0x7777, 3, 0xFFFF))
    return "yes" if word == "ACK" else word


@check("info-many-kinds", ROOM, MUST, "INFO and GO: a client may ask for any number of kinds")
def info_many_kinds(bench: Bench) -> str:
    word, _ = bench.haggle(NAMED).describe(h.INFO, "alpha", tuple(range(1000)))
    return "yes" if word == "ACK" else word


@check("flags", ROOM, MUST, "Transmission flags: HAS_FLAGS; DF and STATUS_PAYLOAD only when asked")
def flags(bench: Bench) -> str:
    found = bench.enter().flags
    wrong = []
    if not found & ops.HAS_FLAGS:
        wrong.append("HAS_FLAGS is missing")
    if found & (ops.SEND_DF | ops.STATUS_PAYLOAD):
        wrong.append("DF or BLOCK_STATUS_PAYLOAD without structured replies")
    if found & ops.SEND_FAST_ZERO and not found & ops.SEND_ZEROES:
        wrong.append("FAST_ZERO without WRITE_ZEROES")
    if found & ops.READ_ONLY:
        wrong.append("READ_ONLY on a writable export")
    return f"wrong: {', '.join(wrong)}" if wrong else f"yes: {found:#x}"


@check("flag-read-only", ROOM, MAY, "Transmission flags: READ_ONLY is set on a read-only export")
def flag_read_only(bench: Bench) -> str:
    return "yes" if bench.enter(READ_ONLY).flags & ops.READ_ONLY else "wrong: it is not set"


@check(
    "unknown-export",
    ROOM,
    MUST,
    "INFO and GO: ERR_UNKNOWN for an export that does not exist, without INFO replies",
    right=("ERR_UNKNOWN",),
)
def unknown_export(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    words = set()
    for option in (h.INFO, h.GO):
        for name in ("alph", "alpha ", "Alpha", "no such export"):
            word, export = haggle.describe(option, name)
            words.add(word)
            if export.kinds:
                raise ViolationError(f"{name!r} is unknown, but INFO replies came")
    in_step(haggle)
    return words.pop() if len(words) == 1 else f"depends: {sorted(words)}"


def _malformed() -> dict[str, bytes]:
    """Data of INFO and GO that contradicts itself, by what is wrong with it."""
    good = h.go_data(b"alpha", (h.INFO_BLOCK_SIZE,))
    return {
        "no data": b"",
        "three bytes": b"\0\0\0",
        "no number of requests": h.sized(b"alpha"),
        "half a number": h.sized(b"alpha") + b"\0",
        "fewer requests than said": h.sized(b"alpha") + struct.pack(">HH", 5, 3),
        "more requests than said": good + b"\0\3",
        "half a request": good + b"\0",
        "the name ends behind the data": struct.pack(">I", len(good) + 1) + good[4:],
    }


@check(
    "go-malformed",
    ROOM,
    MUST,
    "INFO and GO: lengths and number of requests have to fit the option's length",
    right=("ERR_INVALID",),
    legal=("closed",),
)
def go_malformed(bench: Bench) -> str:
    words = {}
    for what, data in _malformed().items():
        for option in (h.INFO, h.GO):
            haggle = bench.haggle(NAMED)
            try:
                words[f"{option}, {what}"] = haggle.word(option, data)
                in_step(haggle)
            except ClosedError:
                words[f"{option}, {what}"] = "closed"
            except SilentError:
                return f"hangs: at option {option}, {what}"
    odd = {what: word for what, word in words.items() if word not in {"ERR_INVALID", "closed"}}
    if odd:
        return f"accepts: {odd}"
    return "closed" if "closed" in words.values() else "ERR_INVALID"


@check(
    "name-4096",
    ROOM,
    MUST,
    "Conventions: a string has up to 4096 bytes, so that such a name is merely unknown",
    right=("ERR_UNKNOWN",),
    legal=("ERR_TOO_BIG", "ERR_INVALID"),
)
def name_4096(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    word, _ = haggle.describe(h.GO, "n" * 4096)
    in_step(haggle)
    return word


@check(
    "name-too-long",
    ROOM,
    MUST,
    "Conventions: no string is longer than 4096 bytes",
    right=("ERR_INVALID", "ERR_TOO_BIG", "ERR_UNKNOWN"),
    legal=("closed",),
)
def name_too_long(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    word, _ = haggle.describe(h.GO, "n" * 5000)
    in_step(haggle)
    return word


@check(
    "name-with-nul",
    ROOM,
    MUST,
    "Conventions: a string contains no NUL; `alpha NUL x` is not `alpha`",
    right=("ERR_INVALID", "ERR_UNKNOWN"),
    legal=("closed",),
)
def name_with_nul(bench: Bench) -> str:
    with contextlib.suppress(ClosedError):
        haggle = bench.haggle(NAMED)
        haggle.send(h.EXPORT_NAME, b"alpha\0x")
        return f"accepts: EXPORT_NAME, with {haggle.wire.take(10).hex()}"
    word, _ = bench.haggle(NAMED).describe(h.GO, b"alpha\0x")
    return f"accepts: {word}" if word == "ACK" else word


@check(
    "name-not-utf8",
    ROOM,
    MUST,
    "Conventions: a name is UTF-8, and so is what an error says of it",
    right=("ERR_INVALID", "ERR_UNKNOWN"),
    legal=("closed",),
)
def name_not_utf8(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    word, _ = haggle.describe(h.GO, b"alpha\xff\xfe\xc3")
    in_step(haggle)
    return word


@check(
    "name-in-log",
    ROOM,
    CARE,
    "A name is bytes of a stranger; the log shows no control characters and no forged lines of it",
)
def name_in_log(bench: Bench) -> str:
    running = bench.fresh(NAMED)
    bench.haggle(running).describe(h.GO, b"x\nforged line\x1b[2J")
    haggle = bench.haggle(running)
    haggle.send(h.EXPORT_NAME, b"x\nforged line\x1b[2J")
    haggle.wire.rest()
    lines = running.said.splitlines()
    if any(line.startswith("forged") for line in lines) or "\x1b" in running.said:
        return f"forged: {running.said[-120:]!r}"
    return "yes"


@check("style-by-go", ROOM, MUST, "Simple reply message: without negotiation, all are simple")
def style_by_go(bench: Bench) -> str:
    client = bench.enter(PLAIN, style=Style.SIMPLE)
    answers = client.do(ops.Op(ops.READ, 0, 4096), ops.Op(ops.READ, 2 * MIB, 4096))
    return "yes" if all(answer.simple for answer in answers) else "wrong"

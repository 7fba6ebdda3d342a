"""Checks of metadata contexts and of BLOCK_STATUS, with structured replies and extended headers.

What a server says of an extent is compared with what its image reads as; that it finds holes at all
is a check of its own, because a server may always say "data".

Not covered: contexts other than `base:allocation`.
"""

from __future__ import annotations

import struct

from tests.blackbox import haggle as h
from tests.blackbox import ops as o
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.errors import in_step
from tests.blackbox.handshake import in_step as options_in_step
from tests.blackbox.ops import READ, STATUS, WRITE, ZEROES, Op
from tests.blackbox.running import SCRATCH
from tests.blackbox.servers import MIB, NAMED, PLAIN, SEVERAL, Setup
from tests.blackbox.transmit import Style, Transmission, enter
from tests.blackbox.wire import AbsentError, ClosedError, ViolationError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM = Feature.META
KIB = 1 << 10
WALK_MOST = 10_000
"""Requests after which a walk over an image of 64 MiB makes no progress."""


def structured(bench: Bench, setup: Setup = NAMED) -> h.Haggle:
    """Connect and negotiate structured replies."""
    haggle = bench.haggle(setup)
    haggle.need(h.STRUCTURED_REPLY, "STRUCTURED_REPLY")
    return haggle


def chosen(haggle: h.Haggle, option: int, *queries: str, export: str = "alpha") -> list[str]:
    """Return the contexts that an option names; a refusal is a word of its own."""
    word, found = haggle.choose(option, export, *queries)
    if word == "ERR_UNSUP":
        raise AbsentError("metadata contexts are answered with ERR_UNSUP")
    return sorted(found.values()) if word == "ACK" else [word]


@check("list-meta", ROOM, MUST, "LIST_META_CONTEXT: without queries, all contexts are listed")
def list_meta(bench: Bench) -> str:
    found = chosen(structured(bench), h.LIST_META)
    return "yes" if h.ALLOCATION in found else f"wrong: {found}"


@check("list-meta-wildcard", ROOM, MUST, "The base: namespace: `base:` lists all contexts in it")
def list_meta_wildcard(bench: Bench) -> str:
    found = chosen(structured(bench), h.LIST_META, "base:")
    return "yes" if found == [h.ALLOCATION] else f"wrong: {found}"


@check("list-meta-query", ROOM, MUST, "LIST_META_CONTEXT: a query lists what matches it")
def list_meta_query(bench: Bench) -> str:
    found = chosen(structured(bench), h.LIST_META, h.ALLOCATION, "x-nobody:here")
    return "yes" if found == [h.ALLOCATION] else f"wrong: {found}"


@check("meta-unknown", ROOM, MUST, "Contexts: unknown namespaces and unknown leaves are ignored")
def meta_unknown(bench: Bench) -> str:
    for option in (h.LIST_META, h.SET_META):
        found = chosen(structured(bench), option, "x-nobody:here", "base:nothing", "base:alloc")
        if found:
            return f"wrong: {found} in answer to option {option}"
    return "yes"


@check("set-meta", ROOM, MUST, "SET_META_CONTEXT: a context is selected, with an id")
def set_meta(bench: Bench) -> str:
    found = chosen(structured(bench), h.SET_META, "x-nobody:here", h.ALLOCATION)
    return "yes" if found == [h.ALLOCATION] else f"wrong: {found}"


@check("set-meta-wildcard", ROOM, MUST, "The base: namespace: `base:` alone selects nothing")
def set_meta_wildcard(bench: Bench) -> str:
    found = chosen(structured(bench), h.SET_META, "base:")
    return f"wrong: {found}" if found else "yes"


@check("set-meta-nothing", ROOM, MUST, "SET_META_CONTEXT: without queries, nothing is selected")
def set_meta_nothing(bench: Bench) -> str:
    found = chosen(structured(bench), h.SET_META)
    return f"wrong: {found}" if found else "yes"


@check("set-meta-twice", ROOM, MUST, "BLOCK_STATUS: a context asked for twice is selected once")
def set_meta_twice(bench: Bench) -> str:
    haggle = structured(bench)
    found = chosen(haggle, h.SET_META, h.ALLOCATION, h.ALLOCATION)
    if found != [h.ALLOCATION]:
        return f"wrong: {found}"
    enter(haggle, "alpha").must(Op(STATUS, 0, MIB))
    return "yes"


@check(
    "set-meta-many",
    ROOM,
    MAY,
    "SET_META_CONTEXT: too many queries may fail with TOO_BIG, or else they are all looked at",
    right=("selected", "ERR_TOO_BIG"),
    legal=("ERR_INVALID", "closed"),
)
def set_meta_many(bench: Bench) -> str:
    haggle = structured(bench)
    queries = [f"x-{number}:leaf" for number in range(300)]
    found = chosen(haggle, h.SET_META, *queries, h.ALLOCATION)
    options_in_step(haggle)
    return "selected" if found == [h.ALLOCATION] else str(found[0] if found else "wrong")


@check(
    "set-meta-simple",
    ROOM,
    SHOULD,
    "SET_META_CONTEXT: ERR_INVALID where structured replies were not negotiated",
    right=("ERR_INVALID",),
)
def set_meta_simple(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    found = chosen(haggle, h.SET_META, h.ALLOCATION)
    options_in_step(haggle)
    return found[0] if found and found[0].startswith("ERR") else f"accepted: {found}"


@check(
    "meta-unknown-export",
    ROOM,
    CARE,
    "ERR_UNKNOWN: contexts of an export that does not exist",
    right=("ERR_UNKNOWN",),
)
def meta_unknown_export(bench: Bench) -> str:
    words = set()
    for option in (h.LIST_META, h.SET_META):
        found = chosen(structured(bench), option, h.ALLOCATION, export="nowhere")
        words.add(found[0] if found else "nothing")
    return words.pop() if len(words) == 1 else f"depends: {sorted(words)}"


def _malformed() -> dict[str, bytes]:
    good = h.meta_data(b"alpha", b"base:allocation")
    return {
        "no data": b"",
        "no number of queries": h.sized(b"alpha"),
        "the export's name ends behind the data": struct.pack(">I", 1 << 20) + good[4:],
        "a query ends behind the data": good[:-15] + good[-14:],
        "fewer queries than said": h.sized(b"alpha") + struct.pack(">I", 2) + good[13:],
    }


@check(
    "meta-malformed",
    ROOM,
    MUST,
    "LIST_META_CONTEXT and SET_META_CONTEXT: ERR_INVALID for lengths that do not fit",
    right=("ERR_INVALID",),
    legal=("closed",),
)
def meta_malformed(bench: Bench) -> str:
    words = {}
    for what, data in _malformed().items():
        for option in (h.LIST_META, h.SET_META):
            haggle = structured(bench)
            try:
                words[f"{option}, {what}"] = haggle.word(option, data)
                options_in_step(haggle)
            except ClosedError:
                words[f"{option}, {what}"] = "closed"
    if set(words.values()) == {"ERR_UNSUP"}:
        raise AbsentError("metadata contexts are answered with ERR_UNSUP")
    odd = {what: word for what, word in words.items() if word not in {"ERR_INVALID", "closed"}}
    if odd:
        return f"accepts: {odd}"
    return "closed" if "closed" in words.values() else "ERR_INVALID"


@check(
    "meta-trailing",
    ROOM,
    CARE,
    "SET_META_CONTEXT: data behind the last query are a fault, too",
    right=("ERR_INVALID",),
    legal=("closed",),
)
def meta_trailing(bench: Bench) -> str:
    haggle = structured(bench)
    word = haggle.word(h.SET_META, h.meta_data(b"alpha", b"base:allocation") + b"\0\0\0\0")
    options_in_step(haggle)
    if word == "ERR_UNSUP":
        raise AbsentError("metadata contexts are answered with ERR_UNSUP")
    return word


def _status_word(haggle: h.Haggle, name: str) -> str:
    client = enter(haggle, name)
    client.contexts = {}
    answer = client.do(Op(STATUS, 0, 4096))[0]
    return o.ERRORS[answer.error]


NOTHING_SELECTED = "Metadata querying: EINVAL for BLOCK_STATUS where no context is selected"


@check("status-unselected", ROOM, SHOULD, NOTHING_SELECTED, right=("EINVAL",), legal=("closed",))
def status_unselected(bench: Bench) -> str:
    client = bench.enter(PLAIN, style=Style.STRUCTURED)
    word = client.word(Op(STATUS, 0, 4096))
    in_step(client)
    return word


@check(
    "set-meta-replaces",
    ROOM,
    MUST,
    "SET_META_CONTEXT: each replaces what was selected before, even when it selects nothing",
    right=("EINVAL",),
    legal=("closed",),
)
def set_meta_replaces(bench: Bench) -> str:
    haggle = structured(bench)
    chosen(haggle, h.SET_META, h.ALLOCATION)
    chosen(haggle, h.SET_META, "x-nobody:here")
    return _status_word(haggle, "alpha")


@check(
    "set-meta-fails",
    ROOM,
    MUST,
    "SET_META_CONTEXT: what was selected before is gone, including when the command fails",
    right=("EINVAL",),
    legal=("closed",),
)
def set_meta_fails(bench: Bench) -> str:
    haggle = structured(bench)
    chosen(haggle, h.SET_META, h.ALLOCATION)
    if haggle.word(h.SET_META, _malformed()["a query ends behind the data"]) == "ACK":
        return "accepts: a malformed SET_META_CONTEXT"
    return _status_word(haggle, "alpha")


@check(
    "set-meta-other-export",
    ROOM,
    SHOULD,
    "Metadata querying: contexts of another export than the one entered are not selected",
    right=("EINVAL",),
    legal=("closed",),
)
def set_meta_other_export(bench: Bench) -> str:
    haggle = structured(bench, SEVERAL)
    chosen(haggle, h.SET_META, h.ALLOCATION)
    return _status_word(haggle, "beta")


def walk(client: Transmission, *, one: bool = False, step: int = 64 * MIB) -> list[int]:
    """Return the flags of each 512 bytes of the export, as BLOCK_STATUS tells them."""
    flags: list[int] = []
    for _ in range(WALK_MOST):
        at = len(flags) * 512
        length = min(step, client.size - at)
        if not length:
            return flags
        (answer,) = client.do(Op(STATUS, at, length, flags=o.REQ_ONE if one else 0))
        if answer.error:
            raise ViolationError(f"BLOCK_STATUS of {length} at {at}: {o.ERRORS[answer.error]}")
        (extents,) = answer.extents.values()
        for size, state in extents:
            if size % 512:
                raise ViolationError(f"an extent of {size} bytes at {at}")
            flags += [state] * (size // 512)
        del flags[client.size // 512 :]
    raise ViolationError(f"BLOCK_STATUS needs more than {WALK_MOST} requests for 64 MiB")


def true_extents(client: Transmission, *, one: bool, step: int) -> str:
    """Compare what BLOCK_STATUS tells with what READ returns."""
    flags = walk(client, one=one, step=step)
    for place in range(0, client.size, 8 * MIB):
        data = client.read(place, 8 * MIB)
        for number in range(8 * MIB // 512):
            state = flags[place // 512 + number]
            if state & o.STATE_ZERO and data[number * 512 : number * 512 + 512].strip(b"\0"):
                return f"wrong: {place + number * 512} is said to be zero, and is not"
            if state & ~(o.STATE_HOLE | o.STATE_ZERO):
                return f"wrong: the state {state:#x}"
    return "yes"


@check("status", ROOM, MUST, "BLOCK_STATUS: what is said to be zero reads as zeroes")
def status(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED, status=True)
    return true_extents(client, one=False, step=64 * MIB)


@check("status-req-one", ROOM, MUST, "REQ_ONE: one extent, no longer than the request, and true")
def status_req_one(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED, status=True)
    return true_extents(client, one=True, step=3 * MIB)


@check("status-finds-holes", ROOM, SHOULD, "BLOCK_STATUS: holes are reported as such")
def status_finds_holes(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED, status=True)
    (answer,) = client.do(Op(STATUS, 2 * MIB, MIB))
    (extents,) = answer.extents.values()
    return "yes" if extents[0][1] == o.STATE_HOLE | o.STATE_ZERO else f"wrong: {extents[:4]}"


@check("status-after-write", ROOM, MUST, "BLOCK_STATUS: after a WRITE the place is not zero")
def status_after_write(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED, status=True)
    other = bench.enter(style=Style.STRUCTURED, status=True)
    for number in range(8):
        place = 12 * MIB + number * 256 * KIB
        client.must(Op(STATUS, place, 64 * KIB), Op(WRITE, place, data=b"\x77" * 4096))
        for reader in (client, other):
            (answer,) = reader.do(Op(STATUS, place, 4096))
            (extents,) = answer.extents.values()
            if extents[0][1]:
                return f"wrong: {extents[0]} where data were written"
        client.must(Op(ZEROES, place, 4096))
    return "yes"


@check(
    "status-past-end",
    ROOM,
    SHOULD,
    "BLOCK_STATUS: EINVAL past the end",
    right=("EINVAL",),
    legal=("closed",),
)
def status_past_end(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED, status=True)
    places = ((client.size - 4096, 8192), (client.size, 512), (1 << 62, 512), (2**64 - 512, 1024))
    words = {client.word(Op(STATUS, *place)) for place in places}
    in_step(client)
    return words.pop() if len(words) == 1 else f"depends: {sorted(words)}"


@check("status-pipeline", ROOM, MUST, "Transmission: BLOCK_STATUS, READ and WRITE mingle")
def status_pipeline(bench: Bench) -> str:
    client = bench.enter(style=Style.STRUCTURED, status=True)
    ops: list[Op] = []
    for n in range(32):
        ops += [Op(STATUS, n * 64 * KIB, 64 * KIB), Op(READ, n * 4096, 4096)]
        ops += [Op(WRITE, SCRATCH + n * 4096, data=bytes(4096))]
    failed = [op.command for op, answer in zip(ops, client.do(*ops), strict=True) if answer.error]
    return f"wrong: the commands {failed} fail" if failed else "yes"

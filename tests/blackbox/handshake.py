"""Checks of the handshake: greeting, client flags, EXPORT_NAME, LIST, ABORT, unknown options.

Not covered: INFO and GO (`exports`), TLS (`tls`), and options that negotiate replies.
"""

from __future__ import annotations

from tests.blackbox import haggle as h
from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.running import pattern
from tests.blackbox.servers import FOREIGN, NAMED, PLAIN, SEVERAL, UNNAMED, Setup
from tests.blackbox.transmit import Transmission, enter
from tests.blackbox.wire import ClosedError, ViolationError

MUST, SHOULD, CARE = Level.MUST, Level.SHOULD, Level.CARE
ROOM = Feature.HANDSHAKE


def in_step(haggle: h.Haggle) -> None:
    """The next option is understood as such; otherwise a Violation."""
    with haggle.wire.clock.muted():
        word = haggle.word(h.UNKNOWN_OPTION)
    if word not in {"ERR_UNSUP", "ERR_TLS_REQD"}:
        raise ViolationError(f"afterwards, an unknown option is answered with {word}")


def served(client: Transmission, export: str = "disk") -> str:
    """Return "yes" when a READ returns what the image holds; otherwise a Violation."""
    with client.wire.clock.muted():
        data = client.read(0, 4096)
        client.leave()
    if data != pattern(export)[:4096]:
        raise ViolationError("a READ returns wrong data")
    return "yes"


@check("greeting", ROOM, MUST, "Handshake flags: FIXED_NEWSTYLE is set, and at most NO_ZEROES")
def greeting(bench: Bench) -> str:
    flags = h.Haggle(bench.wire()).flags
    if flags & ~(h.FIXED_NEWSTYLE | h.NO_ZEROES):
        raise ViolationError(f"the handshake flags are {flags:#x}")
    return "yes" if flags == 3 else f"lacks a flag: {flags:#x}"


@check("export-name", ROOM, MUST, "Client flags: with NO_ZEROES, EXPORT_NAME sends 10 bytes")
def export_name(bench: Bench) -> str:
    haggle = bench.haggle()
    return served(Transmission(haggle, haggle.enter_by_name("disk")))


@check("zeroes", ROOM, MUST, "Newstyle negotiation: without NO_ZEROES, 124 zeroes follow")
def zeroes(bench: Bench) -> str:
    haggle = bench.haggle(flags=h.FIXED_NEWSTYLE)
    return served(Transmission(haggle, haggle.enter_by_name("disk")))


@check(
    "not-fixed", ROOM, Level.MAY, "Newstyle negotiation: EXPORT_NAME works without FIXED_NEWSTYLE"
)
def not_fixed(bench: Bench) -> str:
    for flags in (0, h.NO_ZEROES):
        haggle = bench.haggle(flags=flags)
        served(Transmission(haggle, haggle.enter_by_name("disk")))
    return "yes"


@check("no-zeroes-after-go", ROOM, MUST, "INFO and GO: no padding follows GO's ACK, ever")
def no_zeroes_after_go(bench: Bench) -> str:
    return served(enter(bench.haggle(flags=h.FIXED_NEWSTYLE), "disk"))


@check(
    "export-name-unknown",
    ROOM,
    MUST,
    "EXPORT_NAME: the server must terminate the session when the export does not exist",
    right=("closed",),
)
def export_name_unknown(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    haggle.send(h.EXPORT_NAME, b"no such export")
    if said := haggle.wire.rest():
        raise ViolationError(f"an unknown export is answered with {said[:20].hex()}")
    return "closed"


@check("list", ROOM, MUST, "LIST: one SERVER reply for each export, then ACK")
def list_exports(bench: Bench) -> str:
    names = [name for name, _ in bench.haggle(NAMED).exports()]
    return "yes" if names == ["alpha"] else f"wrong: {names}"


@check("list-several", ROOM, MUST, "LIST: each of several exports is listed and can be entered")
def list_several(bench: Bench) -> str:
    names = sorted(name for name, _ in bench.haggle(SEVERAL).exports())
    if names != ["alpha", "beta"]:
        return f"wrong: {names}"
    for name in names:
        served(enter(bench.haggle(SEVERAL), name), name)
    return "yes"


@check("several-apart", ROOM, MUST, "EXPORT_NAME: the name chooses the export; data stay apart")
def several_apart(bench: Bench) -> str:
    for name in ("alpha", "beta"):
        haggle = bench.haggle(SEVERAL)
        served(Transmission(haggle, haggle.enter_by_name(name)), name)
    return "yes"


@check("unnamed", ROOM, Level.MAY, "EXPORT_NAME: the empty name is the default export")
def unnamed(bench: Bench) -> str:
    served(enter(bench.haggle(UNNAMED), ""), "")
    haggle = bench.haggle(UNNAMED)
    return served(Transmission(haggle, haggle.enter_by_name("")), "")


@check("utf8-name", ROOM, MUST, "Conventions: a name is UTF-8; it is listed and entered so")
def utf8_name(bench: Bench) -> str:
    (name,) = FOREIGN.exports
    names = [found for found, _ in bench.haggle(FOREIGN).exports()]
    if names != [name]:
        return f"wrong: {names}"
    return served(enter(bench.haggle(FOREIGN), name), name)


@check(
    "list-with-data",
    ROOM,
    SHOULD,
    "LIST: a request that includes data is rejected with ERR_INVALID",
    right=("ERR_INVALID",),
    legal=("closed",),
)
def list_with_data(bench: Bench) -> str:
    haggle = bench.haggle()
    word = haggle.word(h.LIST, b"data")
    in_step(haggle)
    return word


@check("abort", ROOM, MUST, "ABORT: the server must reply with ACK", right=("ACK",))
def abort(bench: Bench) -> str:
    haggle = bench.haggle()
    word = haggle.word(h.ABORT)
    if said := haggle.wire.rest():
        raise ViolationError(f"after the ACK to ABORT come {len(said)} bytes")
    return word


@check("abort-with-data", ROOM, SHOULD, "ABORT: data sent with it is ignored", right=("ACK",))
def abort_with_data(bench: Bench) -> str:
    return bench.haggle().word(h.ABORT, b"data that is to be ignored")


@check(
    "unknown-option",
    ROOM,
    MUST,
    "Baseline: unknown options are answered with ERR_UNSUP, and the next one is parsed",
    right=("ERR_UNSUP",),
)
def unknown_option(bench: Bench) -> str:
    haggle = bench.haggle()
    words = [haggle.word(h.PEEK_EXPORT, b"disk"), haggle.word(h.UNKNOWN_OPTION, bytes(100))]
    in_step(haggle)
    haggle.exports()
    served(enter(haggle, "disk"))
    return "ERR_UNSUP" if set(words) == {"ERR_UNSUP"} else f"wrong: {words}"


@check(
    "unknown-option-long",
    ROOM,
    MUST,
    "Newstyle negotiation: an option that is not understood is skipped by its length",
    right=("ERR_UNSUP", "ERR_TOO_BIG"),
    legal=("closed", "ERR_INVALID"),
)
def unknown_option_long(bench: Bench) -> str:
    haggle = bench.haggle()
    word = haggle.word(h.UNKNOWN_OPTION, bytes(8000))
    in_step(haggle)
    return word


@check(
    "option-magic",
    ROOM,
    Level.MAY,
    "Termination during haggling: a wrong magic is a violation, so the server may hang up",
    right=("closed",),
)
def option_magic(bench: Bench) -> str:
    haggle = bench.haggle()
    haggle.wire.send(b"IHAVEOPS" + h.pack_option(h.LIST)[8:])
    if said := haggle.wire.rest():
        return f"answers: {said[:20].hex()}"
    return "closed"


@check("byte-by-byte", ROOM, MUST, "Handshake: a stream; messages may come in any pieces")
def byte_by_byte(bench: Bench) -> str:
    haggle = h.Haggle(bench.wire())
    for byte in bytes([0, 0, 0, 3]) + h.pack_option(h.GO, h.go_data(b"disk", (3,))):
        haggle.wire.send(bytes([byte]))
    replies = haggle.replies(h.GO)
    return "yes" if replies[-1].word == "ACK" else replies[-1].word


@check("error-then-go", ROOM, MUST, "Termination during haggling: an error does not end it")
def error_then_go(bench: Bench) -> str:
    haggle = bench.haggle(NAMED)
    for option, data in ((h.INFO, h.go_data(b"nix")), (h.UNKNOWN_OPTION, b""), (h.LIST, b"x")):
        haggle.ask(option, data)
    return served(enter(haggle, "alpha"), "alpha")


def _flags(bench: Bench, flags: int, setup: Setup = PLAIN) -> str:
    haggle = bench.haggle(setup, flags=flags)
    try:
        return f"ignored: LIST is answered with {haggle.word(h.LIST)}"
    except ClosedError:
        return "closed"


@check(
    "unknown-client-flag",
    Feature.CLIENT_FLAGS,
    MUST,
    "Client flags: the server must drop the connection if the client sets an unknown flag",
    right=("closed",),
)
def unknown_client_flag(bench: Bench) -> str:
    words = {_flags(bench, flags) for flags in (1 << 31 | 3, 1 << 2 | 3, 0xFFFFFFFF)}
    return words.pop() if len(words) == 1 else f"depends: {sorted(words)}"


@check("known-client-flags", Feature.CLIENT_FLAGS, MUST, "Client flags: 3 is accepted")
def known_client_flags(bench: Bench) -> str:
    return "yes" if bench.haggle(flags=3).exports() else "wrong: LIST names nothing"

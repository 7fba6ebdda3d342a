"""Checks of STARTTLS in its three modes, of certificates, and of what TLS must make forgotten.

Not covered: cipher suites, pre-shared keys, and how TLS ends when the server stops.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

from tests.blackbox import haggle as h
from tests.blackbox.bench import Bench
from tests.blackbox.certificates import client_context, context_of_version
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.handshake import in_step, served
from tests.blackbox.ops import ERRORS, FUA, READ, STATUS, WRITE, Op
from tests.blackbox.running import SCRATCH
from tests.blackbox.servers import MIB, PLAIN, TLS_ALLOW, TLS_ANYBODY, TLS_REQUIRE, TLS_VERIFY
from tests.blackbox.transmit import Transmission, enter
from tests.blackbox.wire import ClosedError, ViolationError

MUST, SHOULD, MAY, CARE = Level.MUST, Level.SHOULD, Level.MAY, Level.CARE
ROOM = Feature.TLS


@check(
    "tls-off",
    ROOM,
    MUST,
    "NOTLS mode: STARTTLS is refused with ERR_POLICY or ERR_UNSUP, and ERR_TLS_REQD never comes",
    right=("ERR_POLICY", "ERR_UNSUP"),
)
def tls_off(bench: Bench) -> str:
    haggle = bench.haggle(PLAIN)
    word = haggle.word(h.STARTTLS)
    others = {haggle.word(h.LIST), haggle.word(h.INFO, h.go_data(b"nix")), haggle.word(99)}
    if "ERR_TLS_REQD" in others:
        raise ViolationError("ERR_TLS_REQD although there is no TLS")
    served(enter(haggle, "disk"))
    return word


@check("tls-allow-plain", ROOM, MAY, "SELECTIVETLS mode: a client may do without TLS")
def tls_allow_plain(bench: Bench) -> str:
    return served(enter(bench.haggle(TLS_ALLOW), "disk"))


@check("tls-allow-upgrade", ROOM, MUST, "SELECTIVETLS mode: STARTTLS gets ACK, and TLS runs")
def tls_allow_upgrade(bench: Bench) -> str:
    return served(enter(bench.secure(TLS_ALLOW), "disk"))


@check("tls-require-upgrade", ROOM, MUST, "FORCEDTLS mode: STARTTLS gets ACK, and TLS runs")
def tls_require_upgrade(bench: Bench) -> str:
    haggle = bench.secure(TLS_REQUIRE)
    in_step(haggle)
    if not haggle.exports():
        return "wrong: LIST inside TLS names no export"
    return served(enter(haggle, "disk"))


@check("tls-export-name", ROOM, MUST, "FORCEDTLS mode: inside TLS, EXPORT_NAME works")
def tls_export_name(bench: Bench) -> str:
    haggle = bench.secure(TLS_REQUIRE)
    return served(Transmission(haggle, haggle.enter_by_name("disk")))


@check(
    "tls-require-refuses",
    ROOM,
    MUST,
    "FORCEDTLS mode: every other option, unknown ones included, is answered with ERR_TLS_REQD",
    right=("ERR_TLS_REQD",),
)
def tls_require_refuses(bench: Bench) -> str:
    asked = {
        "LIST": (h.LIST, b""),
        "INFO": (h.INFO, h.go_data(b"disk", (3,))),
        "GO": (h.GO, h.go_data(b"disk", (3,))),
        "STRUCTURED_REPLY": (h.STRUCTURED_REPLY, b""),
        "SET_META_CONTEXT": (h.SET_META, h.meta_data(b"disk", b"base:allocation")),
        "unknown": (h.UNKNOWN_OPTION, b"data"),
    }
    words = {}
    for what, (option, data) in asked.items():
        replies = bench.haggle(TLS_REQUIRE).ask(option, data)
        if len(replies) > 1:
            raise ViolationError(f"{what} is answered before TLS: {replies[0]}")
        words[what] = replies[-1].word
    odd = {what: word for what, word in words.items() if word != "ERR_TLS_REQD"}
    return f"wrong: {odd}" if odd else "ERR_TLS_REQD"


@check(
    "tls-require-many-refusals",
    ROOM,
    MUST,
    "FORCEDTLS mode: after ERR_TLS_REQD, STARTTLS still gets its ACK on the same connection",
)
def tls_require_many_refusals(bench: Bench) -> str:
    haggle = bench.haggle(TLS_REQUIRE)
    haggle.ask(h.LIST)
    haggle.ask(h.GO, h.go_data(b"disk"))
    haggle.secure(client_context(bench.certificates))
    return served(enter(haggle, "disk"))


@check("tls-require-abort", ROOM, MUST, "FORCEDTLS mode: ABORT gets ACK", right=("ACK",))
def tls_require_abort(bench: Bench) -> str:
    return bench.haggle(TLS_REQUIRE).word(h.ABORT)


@check(
    "tls-require-export-name",
    ROOM,
    MUST,
    "FORCEDTLS mode: EXPORT_NAME before TLS terminates the session, whatever the client's flags",
    right=("closed",),
)
def tls_require_export_name(bench: Bench) -> str:
    for flags in (3, 2, 1, 0):
        haggle = bench.haggle(TLS_REQUIRE, flags=flags)
        haggle.send(h.EXPORT_NAME, b"disk")
        if said := haggle.wire.rest():
            raise ViolationError(f"EXPORT_NAME before TLS is answered with {said[:20].hex()}")
    return "closed"


@check(
    "tls-twice",
    ROOM,
    MUST,
    "FORCEDTLS and SELECTIVETLS mode: STARTTLS inside TLS is answered with ERR_INVALID",
    right=("ERR_INVALID",),
)
def tls_twice(bench: Bench) -> str:
    haggle = bench.secure(TLS_REQUIRE)
    word = haggle.word(h.STARTTLS)
    in_step(haggle)
    served(enter(haggle, "disk"))
    return word


@check(
    "tls-with-data",
    ROOM,
    MUST,
    "STARTTLS: the client must send no data with it; such a request is an error",
    right=("ERR_INVALID",),
    legal=("closed",),
)
def tls_with_data(bench: Bench) -> str:
    haggle = bench.haggle(TLS_REQUIRE)
    word = haggle.word(h.STARTTLS, b"data")
    if word != "ACK":
        in_step(haggle)
        haggle.secure(client_context(bench.certificates))
    return word


def _forgets(bench: Bench, before: Callable[[h.Haggle], None]) -> h.Haggle:
    haggle = bench.haggle(TLS_ALLOW)
    before(haggle)
    haggle.secure(client_context(bench.certificates))
    return haggle


@check(
    "tls-forgets-structured",
    ROOM,
    MUST,
    "STARTTLS (CVE-2021-3716): structured replies negotiated before are forgotten",
)
def tls_forgets_structured(bench: Bench) -> str:
    haggle = _forgets(bench, lambda haggle: haggle.need(h.STRUCTURED_REPLY, "STRUCTURED_REPLY"))
    client = enter(haggle, "disk")
    return "yes" if client.do(Op(READ, 0, 4096))[0].simple else "wrong"


@check(
    "tls-forgets-contexts",
    ROOM,
    MUST,
    "STARTTLS (CVE-2021-3716): metadata contexts selected before are forgotten",
    right=("EINVAL",),
    legal=("closed",),
)
def tls_forgets_contexts(bench: Bench) -> str:
    def select(haggle: h.Haggle) -> None:
        haggle.need(h.STRUCTURED_REPLY, "STRUCTURED_REPLY")
        haggle.choose(h.SET_META, "disk", h.ALLOCATION)

    haggle = _forgets(bench, select)
    haggle.need(h.STRUCTURED_REPLY, "STRUCTURED_REPLY")
    return enter(haggle, "disk").word(Op(STATUS, 0, MIB))


@check(
    "tls-forgets-extended",
    ROOM,
    MUST,
    "STARTTLS (CVE-2021-3716): extended headers negotiated before are forgotten",
)
def tls_forgets_extended(bench: Bench) -> str:
    haggle = _forgets(bench, lambda haggle: haggle.need(h.EXTENDED_HEADERS, "EXTENDED_HEADERS"))
    return served(enter(haggle, "disk"))


@check(
    "tls-plaintext-behind",
    ROOM,
    MUST,
    "FORCEDTLS mode (CVE-2021-3716): plaintext sent behind STARTTLS is not taken for options",
    right=("closed", "ignored"),
)
def tls_plaintext_behind(bench: Bench) -> str:
    haggle = bench.haggle(TLS_REQUIRE)
    haggle.wire.send(h.pack_option(h.STARTTLS) + h.pack_option(h.LIST))
    if (word := haggle.replies(h.STARTTLS)[-1].word) != "ACK":
        return word
    try:
        haggle.wire.shake_hands(client_context(bench.certificates))
        said = haggle.wire.quiet()
    except (ssl.SSLError, ClosedError):
        bench.survives(TLS_REQUIRE, secure=True)
        return "closed"
    if said:
        return f"injected: inside TLS the server says {said[:20].hex()}"
    return "ignored" if served(enter(haggle, "disk")) == "yes" else "wrong"


@check(
    "tls-garbage",
    ROOM,
    MUST,
    "FORCEDTLS mode: an unsuccessful TLS handshake terminates the session",
    right=("closed",),
)
def tls_garbage(bench: Bench) -> str:
    for garbage in (b"\xff" * 512, h.pack_option(h.LIST), bytes(64)):
        haggle = bench.haggle(TLS_REQUIRE)
        haggle.word(h.STARTTLS)
        haggle.wire.send(garbage)
        if (said := haggle.wire.rest()) and said[0] != 0x15:  # a TLS alert
            raise ViolationError(f"after a failed TLS handshake comes {said[:20].hex()}")
    bench.survives(TLS_REQUIRE, secure=True)
    return "closed"


def _speaks(bench: Bench, version: ssl.TLSVersion) -> str:
    haggle = bench.haggle(TLS_REQUIRE)
    try:
        haggle.secure(context_of_version(bench.certificates, version))
    except ClosedError as error:
        return f"refused: {error}"
    return served(enter(haggle, "disk"))


@check("tls-1.2", ROOM, MUST, "TLS versions: TLS 1.2 must be supported")
def tls_1_2(bench: Bench) -> str:
    return _speaks(bench, ssl.TLSVersion.TLSv1_2)


@check("tls-1.3", ROOM, SHOULD, "TLS versions: later versions should be supported")
def tls_1_3(bench: Bench) -> str:
    return _speaks(bench, ssl.TLSVersion.TLSv1_3)


@check(
    "tls-1.1",
    ROOM,
    SHOULD,
    "TLS versions: older versions should not be supported by default",
    right=("refused",),
)
def tls_1_1(bench: Bench) -> str:
    return _speaks(bench, ssl.TLSVersion.TLSv1_1)


@check(
    "tls-without-certificate",
    ROOM,
    CARE,
    "Certificates: where clients are not to be verified, one without a certificate is served",
)
def tls_without_certificate(bench: Bench) -> str:
    return served(enter(bench.secure(TLS_ANYBODY, None), "disk"))


@check("tls-verify-client", ROOM, MAY, "Certificates: a client with a good certificate is served")
def tls_verify_client(bench: Bench) -> str:
    return served(enter(bench.secure(TLS_VERIFY, "client"), "disk"))


def _rejected(bench: Bench, who: str | None) -> str:
    try:
        haggle = bench.secure(TLS_VERIFY, who)
        haggle.ask(h.LIST)
    except ClosedError:
        return "closed"
    return "accepts"


@check(
    "tls-verify-nobody",
    ROOM,
    MAY,
    "Certificates: where clients are verified, one without a certificate is refused",
    right=("closed",),
)
def tls_verify_nobody(bench: Bench) -> str:
    return _rejected(bench, None)


@check(
    "tls-verify-stranger",
    ROOM,
    MAY,
    "Certificates: where clients are verified, one of another authority is refused",
    right=("closed",),
)
def tls_verify_stranger(bench: Bench) -> str:
    return _rejected(bench, "stranger")


@check(
    "tls-closes-in-order",
    ROOM,
    MUST,
    "Terminating the transmission phase: at DISC, TLS is shut down before the connection",
)
def tls_closes_in_order(bench: Bench) -> str:
    client = bench.enter(TLS_REQUIRE, secure=True)
    client.read(0, 4096)
    client.disc()
    return "ragged: no close_notify" if client.wire.ragged else "yes"


@check("tls-data", ROOM, MUST, "FORCEDTLS mode: all further data go over TLS, in any amount")
def tls_data(bench: Bench) -> str:
    client = bench.enter(TLS_REQUIRE, secure=True)
    data = bytes(range(256)) * 16384
    client.must(Op(WRITE, SCRATCH, data=data, flags=FUA))
    if client.read(SCRATCH, len(data)) != data:
        return "wrong: 4 MiB do not come back as written"
    answers = client.do(*(Op(READ, at * 4096, 4096) for at in range(64)))
    client.disc()
    return "yes" if not any(answer.error for answer in answers) else ERRORS[answers[0].error]


@check(
    "tls-idle-handshake",
    ROOM,
    CARE,
    "A client that stops in the middle of the TLS handshake keeps nobody else waiting",
    right=("survives",),
)
def tls_idle_handshake(bench: Bench) -> str:
    for _ in range(5):
        haggle = bench.haggle(TLS_REQUIRE)
        if (word := haggle.word(h.STARTTLS)) != "ACK":
            return word
        haggle.wire.send(b"\x16\x03\x01\x02\x00\x01")
    return bench.survives(TLS_REQUIRE, secure=True)

"""STARTTLS, in the specification's modes NOTLS, SELECTIVETLS and FORCEDTLS.

Two parts of a case have the TLS handshake between them. What is behind STARTTLS without one is a
breach; `wire.feed` checks that for every case that ends there.

Not covered: the handshake itself and certificates, which the session has.
"""

from __future__ import annotations

import pytest

from nbdproxy.nbd.constants import MAX_OPTIONS, Option, OptionReply, TlsMode
from nbdproxy.nbd.server import Phase
from tests.nbd import spec
from tests.nbd.wire import (
    FLAGS,
    Server,
    breach,
    contexts,
    go,
    info_body,
    kinds,
    negotiate,
    option,
    pour,
    query_body,
    request,
    told,
)

ACK, INVALID, TLS_REQD = OptionReply.ACK, OptionReply.ERR_INVALID, OptionReply.ERR_TLS_REQD
OFF, ALLOW, REQUIRE = (Server(tls=mode) for mode in TlsMode)
BOTH = pytest.mark.parametrize("server", [ALLOW, REQUIRE], ids=["allow", "require"])
STARTTLS = option(5)
ANY_OPTION = [*spec.OPTIONS, 0, 4, 12, 0xFFFFFFFF]


def flags_of(events: list[tuple[object, ...]], number: int = Option.GO) -> int:
    """The transmission flags that were told."""
    return int.from_bytes(told(events, number)[0][8:])


def test_without_tls_starttls_is_refused_and_the_negotiation_goes_on() -> None:
    replies = negotiate(STARTTLS + go(), server=OFF)
    assert kinds(replies)[0] == OptionReply.ERR_POLICY
    assert kinds(replies)[-1] == "opened"


@pytest.mark.parametrize("number", ANY_OPTION)
def test_without_required_tls_nothing_is_answered_with_tls_reqd(number: int) -> None:
    for server in (OFF, ALLOW):
        for body in (b"", info_body(b"disk"), query_body(b"nothing", b"base:")):
            if number != Option.EXPORT_NAME:
                assert TLS_REQD not in kinds(negotiate(option(number, body), server=server))


@BOTH
def test_starttls_is_acknowledged_and_then_the_handshake_is_due(server: Server) -> None:
    assert negotiate(STARTTLS, server=server) == [("reply", 5, ACK, b""), ("starttls",)]
    poured = pour((FLAGS + STARTTLS,), 1, server)
    assert poured.connection.phase is Phase.TLS
    assert poured.connection.receive(memoryview(b"")) == (0, [])


@pytest.mark.parametrize("mode", TlsMode)
def test_starttls_with_data_is_invalid_and_starts_nothing(mode: TlsMode) -> None:
    replies = negotiate(option(5, b"\x00") + option(2), server=Server(tls=mode))
    assert kinds(replies) == [INVALID, ACK, "closed"]


@BOTH
def test_a_second_starttls_is_invalid_and_what_is_agreed_stays(server: Server) -> None:
    behind = option(11) + contexts(10, b"disk", spec.CONTEXT) + STARTTLS + option(5, b"x") + go()
    replies = negotiate(STARTTLS, behind, server=server)
    assert kinds(replies)[:6] == [ACK, "starttls", ACK, spec.META_CONTEXT, ACK, INVALID]
    assert kinds(replies)[6] == INVALID
    assert flags_of(replies) & spec.BLOCK_STATUS_PAYLOAD


@pytest.mark.parametrize("number", ANY_OPTION)
@pytest.mark.parametrize("body", [b"", b"\xff" * 20, info_body(b"disk")], ids=len)
def test_required_tls_is_asked_for_before_anything_else_is_said(number: int, body: bytes) -> None:
    asked = option(number, body)
    if number in {Option.STARTTLS, Option.ABORT}:
        expected = INVALID if number == Option.STARTTLS and body else ACK
        assert kinds(negotiate(asked, server=REQUIRE))[0] == expected
    elif number == Option.EXPORT_NAME:
        assert breach(FLAGS + asked, words="without TLS", server=REQUIRE) == []
    else:
        replies = negotiate(asked + STARTTLS, go(), server=REQUIRE)
        assert kinds(replies)[:3] == [TLS_REQD, ACK, "starttls"]
        assert kinds(replies)[-1] == "opened"


@pytest.mark.parametrize("number", [n for n in ANY_OPTION if n != Option.EXPORT_NAME])
def test_with_tls_nothing_is_answered_with_tls_reqd(number: int) -> None:
    for body in (b"", b"\xff" * 20, info_body(b"nothing")):
        replies = negotiate(STARTTLS, option(number, body), server=REQUIRE)
        assert TLS_REQD not in kinds(replies)
        if number not in spec.OPTIONS:
            assert kinds(replies)[-1] == OptionReply.ERR_UNSUP


@BOTH
def test_with_tls_an_export_opens_by_either_option(server: Server) -> None:
    for opens in (go(b"disk"), option(1, b"disk")):
        behind = opens + request(0, 0, 512)
        events = negotiate(STARTTLS, behind, server=server)
        assert [event[0] for event in events[-2:]] == ["opened", "request"]


def test_where_tls_is_allowed_an_export_opens_without() -> None:
    assert kinds(negotiate(go(b"other"), server=ALLOW))[-1] == "opened"
    assert kinds(negotiate(option(1, b"other"), server=ALLOW))[-1] == "opened"


REACHED = {
    "structured": option(8),
    "extended": option(11),
    "both": option(8) + option(11),
    "a context": option(8) + contexts(10, b"disk", spec.CONTEXT),
    "extended and a context": option(11) + contexts(10, b"disk", spec.CONTEXT),
}


@pytest.mark.parametrize("reached", REACHED.values(), ids=REACHED.keys())
def test_starttls_forgets_what_was_agreed_before_it(reached: bytes) -> None:
    told_before = flags_of(negotiate(reached + go(b"disk"), server=ALLOW))
    assert told_before & spec.SEND_DF
    behind = go(b"disk") + request(0, 0, 512) + request(7, 0, 512)
    events = negotiate(reached + STARTTLS, behind, server=ALLOW)
    assert not flags_of(events) & (spec.SEND_DF | spec.BLOCK_STATUS_PAYLOAD)
    # The requests were of the compact form, and no context is left.
    assert [event[0] for event in events[-2:]] == ["request", "refused"]


@pytest.mark.parametrize("reached", REACHED.values(), ids=REACHED.keys())
def test_what_was_forgotten_can_be_agreed_on_again(reached: bytes) -> None:
    again = negotiate(reached + STARTTLS, reached + go(b"disk"), server=ALLOW)
    plain = negotiate(reached + go(b"disk"), server=ALLOW)
    assert flags_of(again) == flags_of(plain)


@pytest.mark.parametrize("number", [9, 10])
def test_contexts_need_chunks_anew_behind_starttls(number: int) -> None:
    behind = contexts(number, b"disk", spec.CONTEXT)
    assert kinds(negotiate(option(8) + STARTTLS, behind, server=ALLOW))[-1] == INVALID


def test_a_context_is_not_kept_over_starttls_where_only_chunks_are_agreed_again() -> None:
    before = option(11) + contexts(10, b"disk", spec.CONTEXT) + STARTTLS
    events = negotiate(before, option(11) + go(b"disk"), server=ALLOW)
    assert flags_of(events) & spec.SEND_DF
    assert not flags_of(events) & spec.BLOCK_STATUS_PAYLOAD


@BOTH
@pytest.mark.parametrize("behind", [b"\x16", b"\x16\x03\x01", go(), option(2), b"x" * 5000])
def test_bytes_behind_starttls_are_never_read_as_plaintext(server: Server, behind: bytes) -> None:
    poured = pour((FLAGS + STARTTLS + behind,), 1 << 20, server)
    assert [event[0] for event in poured.events] == ["send", "starttls"]
    assert "before STARTTLS was answered" in str(poured.connection.breach)
    assert poured.connection.phase is Phase.CLOSED


def test_the_cap_on_options_is_over_both_sides_of_the_handshake() -> None:
    before = option(3) * (MAX_OPTIONS - 2) + STARTTLS
    assert kinds(negotiate(before, go(), server=ALLOW))[-1] == "opened"
    words = f"more than {MAX_OPTIONS} options"
    breach(FLAGS + before, option(3) + go(), words=words, server=ALLOW)


@pytest.mark.parametrize("flags", [b"\x00\x00\x00\x00", b"\x00\x00\x00\x02"])
def test_tls_is_not_for_clients_without_fixed_newstyle(flags: bytes) -> None:
    for server in (OFF, ALLOW, REQUIRE):
        assert breach(flags + STARTTLS, words="fixed newstyle", server=server) == []
    assert breach(flags + option(1, b"disk"), words="without TLS", server=REQUIRE) == []

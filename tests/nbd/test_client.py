"""What a client says, and what it makes of a server that keeps to the specification.

Each stream is fed whole, byte by byte and with trailing bytes. Not covered: servers that do not
keep to it, see test_client_hostile.py; a real server core, see test_joined.py.
"""

from __future__ import annotations

import struct

import pytest

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd.client import ClientConnection, ClientPhase, ServerGoneError
from nbdproxy.nbd.client_haggling import ServerRefusedError
from nbdproxy.nbd.constants import ReplyStyle, TransmissionFlag
from nbdproxy.nbd.export_info import ExportInfo
from tests.nbd import client_wire as wire
from tests.nbd.client_wire import (
    EXTENDED,
    SIMPLE,
    SIZE,
    STRUCTURED,
    asking,
    feed,
    greeting,
    opening,
    ready,
    reply,
)

CHUNKED = (STRUCTURED, EXTENDED)


def sent(option: int, body: bytes = b"") -> tuple[str, bytes]:
    """The event that sends one option."""
    return ("Send", struct.pack(">QII", 0x49484156454F5054, option, len(body)) + body)


HELLO = ("Send", b"\x00\x00\x00\x03")
NAME = b"\x00\x00\x00\x04disk"
ASK_CONTEXT = sent(wire.SET_META, NAME + b"\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation")
ASK_GO = sent(wire.GO, NAME + b"\x00\x03\x00\x01\x00\x02\x00\x03")


def client(**settings: object) -> ClientConnection:
    return ClientConnection("disk", **settings)  # type: ignore[arg-type]


def test_a_modern_server_is_asked_for_everything() -> None:
    outcome = feed(client, opening(EXTENDED))
    assert outcome.events == [
        *(HELLO, sent(wire.EXTENDED_HEADERS), ASK_CONTEXT, ASK_GO),
        ("Ready",),
    ]
    assert outcome.connection.phase is ClientPhase.TRANSMISSION


def test_without_extended_headers_structured_replies_are_asked_for() -> None:
    assert feed(client, opening(STRUCTURED)).events == [
        *(HELLO, sent(wire.EXTENDED_HEADERS), sent(wire.STRUCTURED_REPLY), ASK_CONTEXT, ASK_GO),
        ("Ready",),
    ]


def test_without_chunks_no_context_is_asked_for() -> None:
    assert feed(client, opening(SIMPLE)).events == [
        *(HELLO, sent(wire.EXTENDED_HEADERS), sent(wire.STRUCTURED_REPLY), ASK_GO),
        ("Ready",),
    ]


@pytest.mark.parametrize("refusal", [wire.UNSUP, wire.POLICY, wire.INVALID, 2**31 + 4, 2**31 + 99])
def test_any_refusal_of_what_one_can_do_without_is_taken(refusal: int) -> None:
    said = greeting()
    said += reply(wire.EXTENDED_HEADERS, refusal, b"no") + reply(wire.STRUCTURED_REPLY)
    said += wire.context() + reply(wire.SET_META, refusal, b"none of it counts")
    outcome = feed(client, said + wire.info_export() + reply(wire.GO))
    assert outcome.events[-1] == ("Ready",)
    assert outcome.connection.style is STRUCTURED
    assert not outcome.connection.contexts


def test_what_is_not_wanted_is_not_asked_for() -> None:
    plain = greeting() + wire.info_export() + reply(wire.GO)
    outcome = feed(lambda: client(best=SIMPLE), plain)
    assert outcome.events == [HELLO, ASK_GO, ("Ready",)]
    structured = greeting() + reply(wire.STRUCTURED_REPLY) + wire.info_export() + reply(wire.GO)
    outcome = feed(lambda: client(best=STRUCTURED, contexts=False), structured)
    assert outcome.events == [HELLO, sent(wire.STRUCTURED_REPLY), ASK_GO, ("Ready",)]
    assert not outcome.connection.contexts


def test_a_server_that_selects_no_context_has_none() -> None:
    said = greeting() + reply(wire.EXTENDED_HEADERS) + reply(wire.SET_META)
    outcome = feed(client, said + wire.info_export() + reply(wire.GO))
    assert outcome.events[-1] == ("Ready",)
    assert not outcome.connection.contexts


def test_unknown_handshake_flags_are_not_echoed() -> None:
    assert feed(client, greeting(0xFFFF)).events[0] == HELLO
    assert feed(client, greeting(1)).events[0] == ("Send", b"\x00\x00\x00\x01")


@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("structured", [False, True])
def test_an_old_server_is_asked_by_name(zeroes: bool, structured: bool) -> None:
    said = greeting(1 if zeroes else 3) + reply(wire.EXTENDED_HEADERS, wire.UNSUP)
    if structured:
        said += reply(wire.STRUCTURED_REPLY) + wire.context() + reply(wire.SET_META)
    else:
        said += reply(wire.STRUCTURED_REPLY, wire.UNSUP)
    said += wire.info_blocks(4096, 4096, 4096) + reply(wire.GO, wire.UNSUP)
    said += struct.pack(">QH", SIZE, wire.FLAGS) + bytes(124 if zeroes else 0)
    outcome = feed(client, said)
    assert outcome.breach == ""
    assert outcome.events[-3:] == [ASK_GO, sent(wire.EXPORT_NAME, b"disk"), ("Ready",)]
    assert outcome.connection.style is (STRUCTURED if structured else SIMPLE)
    assert outcome.connection.contexts is structured
    # What came before the refusal of GO does not count.
    assert outcome.connection.export == ExportInfo(
        *("disk", SIZE, TransmissionFlag(wire.FLAGS), ""),
        *(1, 4096, 32 * 1024 * 1024),
    )


def test_what_the_server_tells_is_in_the_export() -> None:
    infos = wire.info_text(1, b"disk/\xff") + wire.info_text(2, "schön".encode())
    infos += reply(wire.GO, wire.INFO, b"\x00\x63 nobody knows this one")
    infos += wire.info_blocks(1, 65536, 2**32 - 1) + wire.info_export(12345, 0x8001)
    connection = ready(infos=infos)
    assert connection.export == ExportInfo(
        *("disk/\udcff", 12345, TransmissionFlag(0x8001), "schön"),
        *(1, 65536, 2**32 - 1),
    )
    assert connection.longest == 32 * 1024 * 1024


def test_the_server_s_limit_of_a_request_holds() -> None:
    connection = ready(infos=wire.info_export() + wire.info_blocks(512, 4096, 8192))
    assert connection.longest == 8192
    connection.request(wire.READ, 0, 8192)
    with pytest.raises(AssertionError):
        connection.request(wire.READ, 0, 8704)


@pytest.mark.parametrize("size", [0, 1, 511, 2**63 - 512])
def test_any_size_that_offsets_can_reach_is_taken(size: int) -> None:
    export = ready(infos=wire.info_export(size)).export
    assert export is not None
    assert export.size == size


def test_an_empty_name_is_the_default_export() -> None:
    outcome = feed(lambda: ClientConnection("", best=SIMPLE), opening(SIMPLE)[:18])
    assert outcome.events[1] == sent(wire.GO, b"\0\0\0\0\x00\x03\x00\x01\x00\x02\x00\x03")


def test_the_longest_name_is_asked_for() -> None:
    outcome = feed(lambda: ClientConnection("n" * 4096, best=SIMPLE), greeting())
    assert len(outcome.events[1][1]) == 16 + 4 + 4096 + 8  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        ClientConnection("n" * 4097)


# TLS


def started() -> ClientConnection:
    """A connection whose TLS handshake is done."""
    connection = client(tls=True)
    hello = greeting() + reply(wire.STARTTLS)
    used, events = connection.receive(memoryview(hello))
    assert used == len(hello)
    assert [wire.plain(event) for event in events] == [HELLO, sent(wire.STARTTLS), ("StartTls",)]
    assert connection.tls_started() == [sent(wire.EXTENDED_HEADERS)[1:]]
    return connection


def test_tls_comes_before_everything_else() -> None:
    assert feed(started, opening(EXTENDED)[18:]).events == [ASK_CONTEXT, ASK_GO, ("Ready",)]


@pytest.mark.parametrize("refusal", [wire.UNSUP, wire.POLICY, wire.INVALID, wire.TLS_REQD])
def test_a_server_without_tls_is_left(refusal: int) -> None:
    outcome = feed(lambda: client(tls=True), greeting() + reply(wire.STARTTLS, refusal, b"no"))
    assert outcome.breach == (
        'the server offers no TLS (it says: "no"): '
        "set it up there, or use nbd:// or nbd+unix:// to go without"
    )
    assert outcome.events == [HELLO, sent(wire.STARTTLS), sent(wire.ABORT)]


# What the server may decline


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (wire.UNKNOWN, 'the server has no export "disk" (it says: "so?"): `nbdinfo --list`'),
        (wire.POLICY, 'the server\'s policy forbids to open the export "disk"'),
        (wire.SHUTDOWN, 'the server is shutting down (it says: "so?"): try again'),
        (wire.TLS_REQD, 'the server requires TLS (it says: "so?"): use nbds:// or nbds+unix://'),
        (2**31 + 10, "the server requires extended headers"),
        (2**31 + 8, 'does not open the export "disk", error 0x80000008'),
        (2**32 - 1, 'does not open the export "disk", error 0xffffffff'),
    ],
)
def test_a_refusal_says_what_to_do_and_is_answered_by_a_good_bye(refusal: int, words: str) -> None:
    said = greeting() + wire.info_export() + reply(wire.GO, refusal, b"so?")
    outcome = feed(lambda: client(best=SIMPLE), said)
    assert words in outcome.breach
    assert outcome.events == [HELLO, ASK_GO, sent(wire.ABORT)]
    assert type(outcome.connection.breach) is ServerRefusedError


def test_tls_or_a_shutdown_at_the_first_option_ends_it_at_once() -> None:
    for refusal, words in ((wire.TLS_REQD, "requires TLS"), (wire.SHUTDOWN, "shutting down")):
        outcome = feed(client, greeting() + reply(wire.EXTENDED_HEADERS, refusal))
        assert words in outcome.breach
        assert outcome.events[-1] == sent(wire.ABORT)


def test_a_server_s_text_is_shown_printable_and_short() -> None:
    said = b"a\x1b[31m\r\n\xff\xe2\x80\xae" + b"x" * 60_000
    outcome = feed(client, greeting() + reply(wire.EXTENDED_HEADERS, wire.SHUTDOWN, said))
    assert outcome.breach.isprintable()
    assert 'it says: "a?[31m??\N{REPLACEMENT CHARACTER}?xxx' in outcome.breach
    assert len(outcome.breach) < 300


# Requests


@pytest.mark.parametrize("style", [SIMPLE, STRUCTURED])
def test_compact_requests(style: ReplyStyle) -> None:
    connection = ready(style)
    assert connection.request(wire.READ, 2**40, 512) == (
        1,
        struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 2**40, 512),
    )
    assert connection.request(wire.WRITE, 0, 3, 1) == (
        2,
        struct.pack(">IHHQQI", 0x25609513, 1, 1, 2, 0, 3),
    )
    assert connection.in_flight == 2


def test_extended_requests_tell_of_a_payload() -> None:
    connection = ready(EXTENDED)
    assert connection.request(wire.TRIM, 0, 2**40) == (
        1,
        struct.pack(">IHHQQQ", 0x21E41C71, 0, 4, 1, 0, 2**40),
    )
    assert connection.request(wire.WRITE, 0, 3, 1) == (
        2,
        struct.pack(">IHHQQQ", 0x21E41C71, 1 | 32, 1, 2, 0, 3),
    )


# Ends


def test_a_good_bye_during_options_is_an_abort() -> None:
    connection = client()
    connection.receive(memoryview(greeting()))
    assert connection.disconnect() == sent(wire.ABORT)[1]
    assert connection.phase is ClientPhase.CLOSED
    connection.server_closed()
    assert connection.breach is None


@pytest.mark.parametrize("style", ReplyStyle)
def test_after_a_good_bye_what_is_in_flight_is_still_answered(style: ReplyStyle) -> None:
    connection = asking((wire.WRITE, 0, 512), (wire.FLUSH, 0, 0), style=style)()
    length = ">IHHQQQ" if style is EXTENDED else ">IHHQQI"
    magic = 0x21E41C71 if style is EXTENDED else 0x25609513
    assert connection.disconnect() == struct.pack(length, magic, 0, 2, 0, 0, 0)
    with pytest.raises(AssertionError):
        connection.request(wire.READ, 0, 512)
    assert connection.disconnect() == b""
    for cookie, phase in ((2, ClientPhase.LEAVING), (1, ClientPhase.CLOSED)):
        done = wire.chunk(wire.NONE, cookie=cookie, style=style)
        done = wire.simple(cookie) if style is SIMPLE else done
        assert connection.receive(memoryview(done)) == (len(done), [(cookie, 0, "")])
        assert connection.phase is phase
    assert connection.receive(memoryview(b"what is this")) == (12, [])
    connection.server_closed()
    assert connection.breach is None


def test_a_good_bye_with_nothing_in_flight_is_the_end() -> None:
    connection = ready()
    assert len(connection.disconnect()) == 28
    assert connection.phase is ClientPhase.CLOSED
    assert ClientConnection("").disconnect() == b""


def test_a_server_that_dies_during_options_is_an_error_wherever_it_happens() -> None:
    """CVE-2021-20286: whatever comes next, be it a good-bye, nothing is raised."""
    old = greeting() + reply(wire.EXTENDED_HEADERS, wire.UNSUP)
    old += reply(wire.STRUCTURED_REPLY, wire.UNSUP) + reply(wire.GO, wire.UNSUP) + b"size"
    for stream in (opening(EXTENDED), opening(STRUCTURED), old):
        for cut in range(len(stream) + 1):
            for polite in (False, True):
                connection = client()
                connection.receive(memoryview(stream[:cut]))
                if polite:
                    connection.disconnect()
                connection.server_closed()
                assert connection.phase is ClientPhase.CLOSED
                assert polite or isinstance(connection.breach, ServerGoneError)
                assert connection.receive(memoryview(b"late")) == (4, [])
                assert connection.disconnect() == b""


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"", "before it said anything"),
        (greeting(), "when asked for EXTENDED_HEADERS"),
        (opening(), "with 0 requests in flight"),
        (
            greeting()
            + reply(wire.EXTENDED_HEADERS, wire.UNSUP)
            + reply(wire.STRUCTURED_REPLY, wire.UNSUP)
            + reply(wire.GO, wire.UNSUP),
            'when asked for the export "disk": most likely it has none of this name',
        ),
    ],
)
def test_what_is_said_of_a_server_that_hung_up(stream: bytes, words: str) -> None:
    connection = client()
    connection.receive(memoryview(stream))
    connection.server_closed()
    assert words in str(connection.breach)
    first = connection.breach
    connection.server_closed()
    assert connection.breach is first


def test_a_server_that_hangs_up_instead_of_tls_is_told() -> None:
    connection = client(tls=True)
    connection.receive(memoryview(greeting() + reply(wire.STARTTLS)))
    connection.server_closed()
    assert "instead of a TLS handshake" in str(connection.breach)
    assert isinstance(connection.breach, ProtocolError)

"""A hostile server during the negotiation: every rule it may break is a breach, and a prompt one.

Each stream is fed whole, byte by byte and with trailing bytes. What is announced is judged by the
header alone, so a stream here often ends behind one: a client that waited would not be done.
Not covered: hostile replies in transmission, see test_client_hostile_replies.py.
"""

from __future__ import annotations

import struct

import pytest

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd.client import ClientConnection, ClientPhase
from nbdproxy.nbd.client_haggling import ServerRefusedError
from nbdproxy.nbd.constants import ReplyStyle
from tests.nbd import client_wire as wire
from tests.nbd.client_wire import (
    ACK,
    EXTENDED_HEADERS,
    GO,
    INFO,
    META_CONTEXT,
    SET_META,
    SIMPLE,
    STRUCTURED_REPLY,
    UNSUP,
    fails,
    feed,
    greeting,
    opening,
    reply,
)

SERVER = 2
"""The reply to LIST."""


def client() -> ClientConnection:
    return ClientConnection("disk")


def simple_client() -> ClientConnection:
    return ClientConnection("disk", best=SIMPLE)


def tls_client() -> ClientConnection:
    return ClientConnection("disk", tls=True)


# The greeting


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1", "this is not an NBD server"),
        (bytes(18), "this is not an NBD server"),
        (b"NBDMAGIC" + bytes(10), "second magic is 0x0"),
        (struct.pack(">8sQQ", b"NBDMAGIC", 0x420281861253, 512), "fixed newstyle"),
        (struct.pack(">8sQQ", b"NBDMAGIC", 0x420281861253, 2**48), "fixed newstyle"),
        (greeting(0), "fixed newstyle"),
        (greeting(2), "fixed newstyle"),
    ],
)
def test_a_greeting_that_is_none(stream: bytes, words: str) -> None:
    for make in (client, tls_client):
        outcome = fails(make, stream, words)
        assert outcome.events == []


# The form of replies to options


def test_a_wrong_magic_of_a_reply() -> None:
    said = greeting() + struct.pack(">QIII", 0x3E889045565A8, EXTENDED_HEADERS, ACK, 0)
    fails(client, said, "began with 0x3e889045565a8")


@pytest.mark.parametrize("option", [GO, STRUCTURED_REPLY, 0, 2**32 - 1])
def test_a_reply_to_an_option_never_asked(option: int) -> None:
    fails(client, greeting() + reply(option), f"answered option {option}")


def test_a_late_reply_to_an_earlier_option() -> None:
    said = greeting() + reply(EXTENDED_HEADERS) + reply(EXTENDED_HEADERS)
    fails(client, said, f"answered option {EXTENDED_HEADERS}")


@pytest.mark.parametrize("kind", [ACK, INFO, META_CONTEXT, SERVER, 0, UNSUP, 2**32 - 1])
@pytest.mark.parametrize("length", [2**16 + 1, 2**31, 2**32 - 1])
def test_a_reply_of_more_than_64_kib_is_not_waited_for(kind: int, length: int) -> None:
    said = greeting() + reply(GO, kind, length=length)
    outcome = fails(simple_client, said, f"announces {length} bytes")
    assert outcome.connection.needed <= 20 + 2**16


def test_a_reply_of_64_kib_is_the_longest() -> None:
    said = greeting() + reply(GO, INFO, b"\x00\x63" + bytes(2**16 - 2)) + wire.info_export()
    assert feed(simple_client, said + reply(GO)).events[-1] == ("Ready",)


def test_an_ack_has_no_data() -> None:
    fails(client, greeting() + reply(EXTENDED_HEADERS, length=1), "has 1 bytes of data")


@pytest.mark.parametrize(
    ("before", "option", "kinds"),
    [
        (b"", EXTENDED_HEADERS, (0, SERVER, INFO, META_CONTEXT, 5, 2**31 - 1)),
        (
            reply(EXTENDED_HEADERS, UNSUP),
            STRUCTURED_REPLY,
            (0, SERVER, INFO, META_CONTEXT, 5, 2**31 - 1),
        ),
        (reply(EXTENDED_HEADERS), SET_META, (0, SERVER, INFO, 5, 2**31 - 1)),
        (
            reply(EXTENDED_HEADERS) + reply(SET_META),
            GO,
            (0, SERVER, META_CONTEXT, 5, 2**31 - 1),
        ),
    ],
)
def test_a_reply_of_a_type_that_does_not_belong(
    before: bytes, option: int, kinds: tuple[int, ...]
) -> None:
    for kind in kinds:
        said = greeting() + before + reply(option, kind, length=60_000)
        fails(client, said, f"with a reply of type {kind}")


def test_starttls_is_answered_by_nothing_but_an_ack_or_an_error() -> None:
    for kind in (0, SERVER, INFO, META_CONTEXT):
        fails(tls_client, greeting() + reply(wire.STARTTLS, kind), f"type {kind}")


@pytest.mark.parametrize(
    ("before", "endless"),
    [
        (b"", wire.info_text(2, b"again")),
        (b"", reply(GO, INFO, b"\x00\x63")),
    ],
)
def test_endless_infos(before: bytes, endless: bytes) -> None:
    outcome = feed(simple_client, greeting() + endless * 1000 + wire.info_export(), slow=False)
    assert "endless replies to GO" in outcome.breach
    fine = greeting() + endless * 999 + wire.info_export() + reply(GO)
    assert feed(simple_client, fine, slow=False).events[-1] == ("Ready",)


# What is told of the export


@pytest.mark.parametrize("infos", [b"", wire.info_text(1, b"disk"), wire.info_blocks(1, 512, 512)])
def test_an_export_of_which_nothing_is_told(infos: bytes) -> None:
    fails(simple_client, opening(SIMPLE, infos=infos)[:18] + infos + reply(GO), "without telling")


@pytest.mark.parametrize("size", [2**63 - 511, 2**63 - 1, 2**63, 2**64 - 512, 2**64 - 1])
def test_a_size_of_2_63_or_more(size: int) -> None:
    """CVE-2023-5215: such a size is negative to whoever keeps it in 64 signed bits."""
    said = greeting() + wire.info_export(size) + reply(GO)
    fails(simple_client, said, f"has {size} bytes, which cannot be")
    old = greeting() + reply(GO, UNSUP) + struct.pack(">QH", size, wire.FLAGS)
    fails(simple_client, old, f"has {size} bytes, which cannot be")


@pytest.mark.parametrize("flags", [0, 0xFFFE])
def test_flags_that_say_there_are_none(flags: int) -> None:
    said = greeting() + wire.info_export(flags=flags) + reply(GO)
    fails(simple_client, said, "are not flags")
    old = greeting() + reply(GO, UNSUP) + struct.pack(">QH", 512, flags)
    fails(simple_client, old, "are not flags")


@pytest.mark.parametrize(
    ("smallest", "preferred", "most"),
    [
        (0, 4096, 2**25),
        (3, 4096, 2**25),
        (131072, 131072, 2**25),
        (2**31, 2**31, 2**32 - 1),
        (512, 0, 2**25),
        (512, 4097, 2**25),
        (1, 256, 2**25),
        (4096, 512, 2**25),
        (512, 4096, 4095),
        (512, 4096, 0),
        (1, 2**31, 2**25),
    ],
)
def test_block_sizes_that_contradict_the_specification(
    smallest: int, preferred: int, most: int
) -> None:
    said = greeting() + wire.info_blocks(smallest, preferred, most)
    fails(simple_client, said, f"at least {smallest}, better {preferred}, at most {most}")


@pytest.mark.parametrize(
    ("smallest", "preferred", "most"),
    [(1, 512, 512), (65536, 65536, 65537), (512, 2**31, 2**32 - 1)],
)
def test_block_sizes_at_the_limits(smallest: int, preferred: int, most: int) -> None:
    infos = wire.info_export() + wire.info_blocks(smallest, preferred, most)
    assert feed(simple_client, greeting() + infos + reply(GO)).events[-1] == ("Ready",)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "too short to have a type"),
        (b"\x00", "too short to have a type"),
        (struct.pack(">HQ", 0, 512), "10 bytes to tell the export's size"),
        (struct.pack(">HQHH", 0, 512, 1, 1), "14 bytes to tell the export's size"),
        (struct.pack(">HII", 3, 512, 512), "10 bytes to tell the block sizes"),
        (struct.pack(">HIIIH", 3, 512, 512, 512, 1), "16 bytes to tell the block sizes"),
        (b"\x00\x01" + b"n" * 4097, "text that is too long"),
        (b"\x00\x02" + b"d" * 4097, "text that is too long"),
        (b"\x00\x01a\x00b", "NUL"),
    ],
)
def test_infos_of_a_wrong_form(body: bytes, words: str) -> None:
    fails(simple_client, greeting() + reply(GO, INFO, body), words)


def test_the_longest_texts() -> None:
    infos = wire.info_text(1, b"n" * 4096) + wire.info_text(2, b"d" * 4096) + wire.info_export()
    export = feed(simple_client, greeting() + infos + reply(GO)).connection.export
    assert export is not None
    assert (len(export.name), len(export.description)) == (4096, 4096)


# Contexts


@pytest.mark.parametrize("name", [b"", b"base:", b"qemu:dirty-bitmap:x", b"base:allocation\x00"])
def test_a_context_that_nobody_asked_for(name: bytes) -> None:
    said = greeting() + reply(EXTENDED_HEADERS) + wire.context(1, name)
    fails(client, said, "which was not asked for")


def test_a_context_without_a_number() -> None:
    said = greeting() + reply(EXTENDED_HEADERS) + reply(SET_META, META_CONTEXT, b"\0\0\1")
    fails(client, said, "which was not asked for")


@pytest.mark.parametrize("number", [wire.CONTEXT, 2])
def test_the_same_context_twice(number: int) -> None:
    said = greeting() + reply(EXTENDED_HEADERS) + wire.context() + wire.context(number)
    fails(client, said, "the same context twice")


# What contradicts what was agreed on


def test_extended_headers_without_go() -> None:
    said = greeting() + reply(EXTENDED_HEADERS) + reply(SET_META, UNSUP) + reply(GO, UNSUP)
    fails(client, said, "does not know GO")


@pytest.mark.parametrize("behind", [b"\x00", b"\x16\x03\x03", reply(EXTENDED_HEADERS)])
@pytest.mark.parametrize("split", [False, True])
def test_plaintext_behind_starttls(behind: bytes, split: bool) -> None:
    """CVE-2021-3716: what a man in the middle slips in would count as protected by TLS."""
    connection = tls_client()
    hello = greeting() + reply(wire.STARTTLS)
    stream = [hello, behind] if split else [hello + behind]
    for part in stream:
        connection.receive(memoryview(part))
    assert "plaintext where TLS begins" in str(connection.breach)
    assert connection.phase is ClientPhase.CLOSED


def test_nothing_is_said_before_tls_and_nothing_of_it_is_kept() -> None:
    connection = tls_client()
    _, events = connection.receive(memoryview(greeting() + reply(wire.STARTTLS)))
    assert [event for event in events if b"disk" in b"".join(event[:1])] == []  # type: ignore[arg-type]
    connection.tls_started()
    assert (connection.style, connection.contexts, connection.export) == (SIMPLE, False, None)


@pytest.mark.parametrize("option", [EXTENDED_HEADERS, GO])
def test_a_server_that_asks_for_tls_within_tls(option: int) -> None:
    connection = ClientConnection("disk", tls=True, best=ReplyStyle(2 if option != GO else 0))
    connection.receive(memoryview(greeting() + reply(wire.STARTTLS)))
    connection.tls_started()
    connection.receive(memoryview(reply(option, wire.TLS_REQD)))
    assert "though it is in use" in str(connection.breach)


def test_a_breach_gets_no_good_bye_and_a_refusal_is_none() -> None:
    outcome = fails(client, greeting() + reply(GO), "answered option")
    assert [event[0] for event in outcome.events] == ["Send", "Send"]
    assert type(outcome.connection.breach) is ProtocolError
    outcome = fails(client, greeting() + reply(EXTENDED_HEADERS, wire.SHUTDOWN), "shutting down")
    assert type(outcome.connection.breach) is ServerRefusedError
    assert outcome.connection.disconnect() == b""
    assert outcome.connection.receive(memoryview(b"more")) == (4, [])

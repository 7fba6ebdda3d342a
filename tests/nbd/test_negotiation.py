"""Fixed newstyle negotiation, each case fed whole, byte by byte and with trailing bytes.

Not covered: TLS, contexts, and what was agreed on for transmission, which have files of their own;
the socket, time-outs and several clients; see tests/interop.
"""

from __future__ import annotations

import struct

import pytest

from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import (
    IHAVEOPT,
    MAX_OPTION_DATA,
    MAX_OPTIONS,
    MAX_OPTIONS_PER_EXPORT,
    Info,
    Option,
    OptionReply,
)
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from tests.nbd.wire import (
    EXPORTS,
    FLAGS,
    SIZE,
    Server,
    breach,
    feed,
    go,
    info_body,
    kinds,
    negotiate,
    option,
    told,
)

ACK, SERVER, INFO = OptionReply.ACK, OptionReply.SERVER, OptionReply.INFO


def test_the_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert codec.greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 0x80000003, 0xFFFFFFFF, 5])
def test_an_unknown_client_flag_ends_the_connection(flags: int) -> None:
    breach(struct.pack(">I", flags), words="unknown handshake flags")


@pytest.mark.parametrize("flags", [0, 2])
@pytest.mark.parametrize("number", [n for n in range(12) if n != Option.EXPORT_NAME])
def test_a_client_without_fixed_newstyle_has_export_name_only(flags: int, number: int) -> None:
    breach(struct.pack(">I", flags) + option(number), words="without fixed newstyle")


@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name_is_answered_with_zeroes_unless_both_said_no(flags: int, zeroes: int) -> None:
    events = feed(struct.pack(">I", flags) + option(Option.EXPORT_NAME, b"other"))
    hello = struct.pack(">QH", 2 * SIZE, int(WRITABLE)) + bytes(zeroes)
    assert events == [("send", hello), ("opened", "other")]


def test_the_empty_name_is_the_first_export() -> None:
    assert negotiate(option(Option.EXPORT_NAME))[-1] == ("opened", "disk")
    assert negotiate(go())[-1] == ("opened", "disk")


def test_an_export_whose_name_is_empty_is_found_by_it() -> None:
    exports = {**EXPORTS, "": ExportInfo("", SIZE, WRITABLE)}
    assert negotiate(go(), server=Server(exports))[-1] == ("opened", "")


def test_without_exports_even_the_empty_name_is_unknown() -> None:
    assert kinds(negotiate(go(), server=Server({}))) == [OptionReply.ERR_UNKNOWN]


@pytest.mark.parametrize("name", [b"nothing", b"disk\x00", b"\xff\xfe", b"x" * 3000, b"x" * 4097])
def test_an_unknown_export_name_ends_the_connection(name: bytes) -> None:
    breach(FLAGS + option(Option.EXPORT_NAME, name), words="does not exist")


@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
@pytest.mark.parametrize("name", [b"nothing", b"\xff\xfe", b"x" * 3000, b"x" * 4096, b"x" * 4097])
def test_an_unknown_name_is_refused_without_being_repeated(number: int, name: bytes) -> None:
    (reply,) = negotiate(go(name, number=number))
    assert reply[:3] == ("reply", number, OptionReply.ERR_UNKNOWN)
    assert isinstance(reply[3], bytes)
    assert len(reply[3]) < 100
    assert name not in reply[3]


def test_a_name_is_as_long_as_the_specification_allows_and_no_longer() -> None:
    names = ["x" * 4096, "x" * 4097]
    server = Server({name: ExportInfo(name, SIZE, WRITABLE) for name in names})
    assert negotiate(go(names[0].encode()), server=server)[-1] == ("opened", names[0])
    assert kinds(negotiate(go(names[1].encode()), server=server)) == [OptionReply.ERR_UNKNOWN]


def test_a_refused_client_may_ask_again() -> None:
    assert kinds(negotiate(go(b"nothing") + go(b"other")))[-2:] == [ACK, "opened"]


def test_names_are_bytes_that_need_not_be_text() -> None:
    name = b"\xff\x00\xfe"
    text = name.decode(errors="surrogateescape")
    server = Server({text: ExportInfo(text, SIZE, WRITABLE, text)})
    assert negotiate(go(name, Info), server=server)[-1] == ("opened", text)
    assert told(negotiate(go(name, Info), server=server), Option.GO)[Info.NAME] == name
    listed = negotiate(option(Option.LIST), server=server)[0][3]
    assert listed == struct.pack(">I", 3) + name + name


def test_list_tells_every_export_and_then_acks() -> None:
    assert negotiate(option(Option.LIST)) == [
        ("reply", Option.LIST, SERVER, struct.pack(">I", 4) + b"disk" + b"the first"),
        ("reply", Option.LIST, SERVER, struct.pack(">I", 5) + b"other"),
        ("reply", Option.LIST, ACK, b""),
    ]


def test_list_with_data_is_invalid() -> None:
    assert kinds(negotiate(option(Option.LIST, b"x"))) == [OptionReply.ERR_INVALID]


@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
def test_size_flags_and_block_sizes_are_always_told(number: int) -> None:
    replies = negotiate(go(b"disk", number=number))
    assert told(replies, number) == {
        Info.EXPORT: struct.pack(">QH", SIZE, int(WRITABLE)),
        Info.BLOCK_SIZE: struct.pack(">III", 1, 4096, 32 * 1024 * 1024),
    }
    assert kinds(replies)[:3] == [INFO, INFO, ACK]


@pytest.mark.parametrize(
    ("info", "text"),
    [(Info.NAME, b"disk"), (Info.DESCRIPTION, b"the first"), (Info.EXPORT, None), (77, None)],
)
def test_name_and_description_are_told_when_asked_for(info: int, text: bytes | None) -> None:
    found = told(negotiate(go(b"", [info], number=Option.INFO)), Option.INFO)
    assert {Info.NAME, Info.DESCRIPTION} & set(found) == ({info} if text is not None else set())
    assert found.get(info) == text or text is None


def test_no_description_is_told_where_there_is_none() -> None:
    assert Info.DESCRIPTION not in told(negotiate(go(b"other", Info)), Option.GO)


def test_info_opens_nothing_and_go_opens() -> None:
    assert kinds(negotiate(go(number=Option.INFO))) == [INFO, INFO, ACK]
    assert kinds(negotiate(go())) == [INFO, INFO, ACK, "opened"]


MALFORMED = {
    "empty": b"",
    "too short for its counts": bytes(5),
    "a name longer than the option": struct.pack(">I", 3) + b"ab" + bytes(2),
    "a name length of 0xffffffff": b"\xff\xff\xff\xff" + bytes(2),
    "fewer infos than counted": info_body(b"disk", [3])[:-1],
    "more infos than counted": info_body(b"disk", [3]) + b"\x00",
    "an info count of 0xffff": struct.pack(">I", 0) + b"\xff\xff",
}


@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_lengths_that_disagree_are_invalid(number: int, body: bytes) -> None:
    assert kinds(negotiate(option(number, body))) == [OptionReply.ERR_INVALID]


def test_abort_is_answered_with_ack_and_nothing_is_read_behind_it() -> None:
    events = negotiate(option(Option.ABORT) + b"whatever follows")
    assert events == [("reply", Option.ABORT, ACK, b""), ("closed",)]


UNSUPPORTED = [0, 4, 12, 13, 0xFFFFFFFF]


@pytest.mark.parametrize("number", UNSUPPORTED)
@pytest.mark.parametrize("body", [b"", b"\x00" * 9, b"x" * MAX_OPTION_DATA], ids=len)
def test_what_is_not_supported_is_said_and_its_data_is_drained(number: int, body: bytes) -> None:
    events = negotiate(option(number, body) + option(Option.ABORT))
    assert kinds(events) == [OptionReply.ERR_UNSUP, ACK, "closed"]
    assert events[0][1] == number


def test_as_many_options_as_the_cap_and_no_more() -> None:
    asked = option(Option.LIST) * (MAX_OPTIONS - 1)
    assert negotiate(asked + go())[-1] == ("opened", "disk")
    breach(FLAGS + asked + option(99) + go(), words="more than 32 options")


def test_a_client_may_ask_of_every_export_over_one_connection() -> None:
    many = Server({f"{i}": ExportInfo(f"{i}", SIZE, WRITABLE) for i in range(100)})
    asked = option(Option.LIST) * (100 * MAX_OPTIONS_PER_EXPORT - 1)
    assert negotiate(asked + go(b"99"), server=many)[-1] == ("opened", "99")
    breach(FLAGS + asked + option(99) + go(b"99"), words="more than 800 options", server=many)


@pytest.mark.parametrize("length", [MAX_OPTION_DATA + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_huge_option_is_not_waited_for(length: int) -> None:
    breach(FLAGS + option(Option.GO, length=length), words="announces")


def test_an_option_without_its_magic_ends_the_connection() -> None:
    data = struct.pack(">QII", IHAVEOPT ^ 1, Option.LIST, 0)
    breach(FLAGS + data, words="IHAVEOPT")

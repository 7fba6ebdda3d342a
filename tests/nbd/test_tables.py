"""The tables against the specification: each number, each row, and that rows are what is done.

The rows are compared with `tests.nbd.spec`, where the specification is written out by hand, and
then driven: a row's replies and errors can all be provoked, and nothing else is ever answered.

Not covered: what a command's row means for a request; see test_transmission and test_extended.
"""

from __future__ import annotations

import itertools

import pytest

from nbdproxy.nbd import constants
from nbdproxy.nbd.constants import Option, OptionReply, ReplyStyle, TlsMode
from nbdproxy.nbd.export_info import READABLE, WRITABLE, ExportInfo
from nbdproxy.nbd.tables import COMMAND_RULES, FLAG_NEEDS, OPTION_RULES, Body, Needs, Terms
from nbdproxy.requests import Command, CommandFlag, NbdErrno
from tests.nbd import spec
from tests.nbd.wire import (
    SIZE,
    Server,
    breach,
    contexts,
    go,
    info_body,
    kinds,
    negotiate,
    option,
    query_body,
)

NUMBERS: dict[str, str] = {
    "HandshakeFlag": "FIXED_NEWSTYLE=1 NO_ZEROES=2",
    "TransmissionFlag": "HAS_FLAGS=1 READ_ONLY=2 SEND_FLUSH=4 SEND_FUA=8 ROTATIONAL=16 "
    "SEND_TRIM=32 SEND_WRITE_ZEROES=64 SEND_DF=128 CAN_MULTI_CONN=256 SEND_CACHE=1024 "
    "SEND_FAST_ZERO=2048 BLOCK_STATUS_PAYLOAD=4096",
    "Option": "EXPORT_NAME=1 ABORT=2 LIST=3 STARTTLS=5 INFO=6 GO=7 STRUCTURED_REPLY=8 "
    "LIST_META_CONTEXT=9 SET_META_CONTEXT=10 EXTENDED_HEADERS=11",
    "OptionReply": "ACK=1 SERVER=2 INFO=3 META_CONTEXT=4 ERR_UNSUP=0x80000001 "
    "ERR_POLICY=0x80000002 ERR_INVALID=0x80000003 ERR_PLATFORM=0x80000004 "
    "ERR_TLS_REQD=0x80000005 ERR_UNKNOWN=0x80000006 ERR_SHUTDOWN=0x80000007 "
    "ERR_BLOCK_SIZE_REQD=0x80000008 ERR_TOO_BIG=0x80000009 ERR_EXT_HEADER_REQD=0x8000000a",
    "Info": "EXPORT=0 NAME=1 DESCRIPTION=2 BLOCK_SIZE=3",
    "Chunk": "NONE=0 OFFSET_DATA=1 OFFSET_HOLE=2 BLOCK_STATUS=5 BLOCK_STATUS_EXT=6 "
    "ERROR=0x8001 ERROR_OFFSET=0x8002",
    "BlockState": "HOLE=1 ZERO=2",
}
MAGICS = {
    "NBD_MAGIC": int.from_bytes(b"NBDMAGIC"),
    "IHAVEOPT": int.from_bytes(b"IHAVEOPT"),
    "OPTION_REPLY_MAGIC": 0x3E889045565A9,
    "REQUEST_MAGIC": 0x25609513,
    "EXTENDED_REQUEST_MAGIC": 0x21E41C71,
    "SIMPLE_REPLY_MAGIC": 0x67446698,
    "STRUCTURED_REPLY_MAGIC": 0x668E33EF,
    "EXTENDED_REPLY_MAGIC": 0x6E8A278C,
    "NBD_PORT": 10809,
    "CHUNK_DONE": 1,
    "CHUNK_ERROR_BIT": 2**15,
    "MAX_STRING": 4096,
    "MAX_MIN_BLOCK": 65_536,
    "MAX_PAYLOAD": 33_554_432,
    "MAX_REPLY_EXTENTS": 2**20,
    "ALLOCATION": "base:allocation",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_each_number_is_the_specifications(name: str) -> None:
    found = {member.name: int(member) for member in getattr(constants, name)}
    pairs = (words.split("=") for words in NUMBERS[name].split())
    assert found == {word: int(number, 0) for word, number in pairs}


@pytest.mark.parametrize("name", MAGICS)
def test_each_constant_is_the_specifications(name: str) -> None:
    assert getattr(constants, name) == MAGICS[name]


def test_the_words_of_requests_are_the_specifications() -> None:
    assert {member.value: member.name for member in Command} == {
        **{number: says.name for number, says in spec.COMMANDS.items()},
        2: "DISC",
    }
    for names in (CommandFlag, NbdErrno):
        for member in names:
            assert member.name == "OK" or getattr(spec, member.name or "") == member.value
    assert {member.value for member in NbdErrno} == {0, 1, 5, 12, 22, 28, 75, 95, 108}
    assert {member.value for member in CommandFlag} == {1, 2, 4, 8, 16, 32}


BODIES = {
    Body.EMPTY: "none",
    Body.IGNORED: "ignored",
    Body.NAME: "name",
    Body.NAME_AND_INFOS: "infos",
    Body.NAME_AND_QUERIES: "queries",
}
NEEDS = {
    Needs.NOTHING: "",
    Needs.CHUNKS: "chunks",
    Needs.COMPACT: "no extended headers",
    Needs.PLAINTEXT: "no TLS",
}


def test_there_is_a_row_for_each_option_and_command() -> None:
    assert set(OPTION_RULES) == set(spec.OPTIONS)
    assert set(COMMAND_RULES) == set(spec.COMMANDS)


@pytest.mark.parametrize("number", spec.OPTIONS)
def test_an_options_row_says_what_the_specification_says(number: int) -> None:
    rule, says = OPTION_RULES[number], spec.OPTIONS[number]
    assert Option(number).name == says.name
    assert BODIES[rule.body] == says.data
    assert NEEDS[rule.needs] == says.needs
    assert set(rule.replies) == says.before
    assert set(rule.errors) == says.errors
    assert len(rule.errors) == len(says.errors)
    assert rule.plaintext == says.plaintext
    otherwise = spec.ERR_EXT_HEADER_REQD if number == 8 else spec.ERR_INVALID
    assert rule.otherwise == otherwise


@pytest.mark.parametrize("number", spec.COMMANDS)
def test_a_commands_row_says_what_the_specification_says(number: int) -> None:
    rule, says = COMMAND_RULES[number], spec.COMMANDS[number]
    assert rule.flags == sum(says.flags)
    assert rule.needs == says.exposed_by
    assert (rule.ranged, rule.modifies) == (says.ranged, says.modifies)
    assert (rule.payload, rule.contexts) == (says.payload, says.contexts)
    assert rule.beyond == says.beyond


def test_each_flag_is_exposed_by_what_the_specification_says() -> None:
    expected = {spec.FUA: spec.SEND_FUA}
    for says in spec.COMMANDS.values():
        expected |= says.flags
    assert expected == FLAG_NEEDS


@pytest.mark.parametrize("style", ReplyStyle)
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("can", [READABLE | 2, WRITABLE])
def test_the_table_refuses_what_the_specification_refuses(
    style: ReplyStyle, chosen: bool, can: int
) -> None:
    export = ExportInfo("disk", SIZE, constants.TransmissionFlag(can), max_payload=SIZE // 2)
    terms = Terms(export, style, contexts=chosen)
    told = spec.flags_told(can, style, contexts=chosen)
    expected = spec.Terms(SIZE, told, style, chosen, max_payload=SIZE // 2)
    assert terms.flags == told
    offsets = (0, 256, 512, SIZE - 512, SIZE, 2**64 - 512)
    lengths = (0, 100, 512, 1024, SIZE // 2, SIZE // 2 + 512, SIZE, 2**32 - 512, 2**64 - 1)
    # PAYLOAD_LEN of extended headers is taken off before a row is asked.
    flags = (0, 1, 2, 4, 8, 16, 18, 64, 0x8000, *([32] if style is not ReplyStyle.EXTENDED else []))
    for command, flag, offset, length in itertools.product(range(9), flags, offsets, lengths):
        refused = terms.refusal(command, flag, offset, length)
        payload = b"" if command == 1 else None
        right = spec.errors(expected, spec.Asked(command, flag, offset, length, payload))
        asked = f"command {command} flags {flag} offset {offset} length {length}"
        if refused is None:
            assert not right, asked
        else:
            assert refused.error in right, asked
            assert refused.text


WELL_FORMED = {
    "none": b"",
    "ignored": b"anything",
    "name": b"disk",
    "infos": info_body(b"disk", [3]),
    "queries": query_body(b"disk", spec.CONTEXT),
}
MALFORMED = {"none": b"x", "infos": b"\x00\x00\x00\x09disk", "queries": info_body(b"disk", [3])}
UNKNOWN = {"infos": info_body(b"nothing"), "queries": query_body(b"nothing", spec.CONTEXT)}
BEFORE = {"": b"", "chunks": option(8), "no extended headers": b"", "no TLS": b""}
TLS = Server(tls=TlsMode.REQUIRE)


@pytest.mark.parametrize("number", OPTION_RULES)
def test_an_option_in_order_is_answered_as_its_row_says(number: int) -> None:
    rule, says = OPTION_RULES[number], spec.OPTIONS[number]
    server = Server(tls=TlsMode.ALLOW)
    asked = option(number, WELL_FORMED[says.data])
    events = negotiate(BEFORE[says.needs] + asked, server=server)
    replies = [event[2] for event in events if event[:2] == ("reply", number)]
    if number == Option.EXPORT_NAME:
        assert kinds(events) == ["send", "opened"]
    else:
        assert replies[-1] == OptionReply.ACK
        assert set(replies[:-1]) == set(rule.replies)


PROVOKED = [(number, error) for number, rule in OPTION_RULES.items() for error in rule.errors]


@pytest.mark.parametrize(("number", "error"), PROVOKED)
def test_each_error_of_a_row_can_be_provoked(number: int, error: int) -> None:
    data = spec.OPTIONS[number].data
    before, server = BEFORE[spec.OPTIONS[number].needs], Server()
    body = WELL_FORMED[data]
    if error == OptionReply.ERR_INVALID:
        body = MALFORMED[data]
    elif error == OptionReply.ERR_UNKNOWN:
        body = UNKNOWN[data]
    elif error == OptionReply.ERR_TLS_REQD:
        before, server = b"", TLS
    elif error == OptionReply.ERR_EXT_HEADER_REQD:
        before = option(11)
    else:
        assert error == OptionReply.ERR_POLICY
    assert kinds(negotiate(before + option(number, body), server=server))[-1] == error


@pytest.mark.parametrize("number", OPTION_RULES)
def test_before_required_tls_only_what_the_row_allows_is_answered(number: int) -> None:
    asked = option(number, WELL_FORMED[spec.OPTIONS[number].data])
    if OPTION_RULES[number].plaintext:
        assert kinds(negotiate(asked, server=TLS))[0] == OptionReply.ACK
    elif number == Option.EXPORT_NAME:
        assert breach(b"\x00\x00\x00\x03" + asked, words="without TLS", server=TLS) == []
    else:
        (reply,) = negotiate(asked, server=TLS)
        assert reply[:3] == ("reply", number, OptionReply.ERR_TLS_REQD)


@pytest.mark.parametrize("number", [n for n, says in spec.OPTIONS.items() if says.needs])
def test_what_an_option_needs_is_needed(number: int) -> None:
    rule, data = OPTION_RULES[number], WELL_FORMED[spec.OPTIONS[number].data]
    before = {Needs.CHUNKS: b"", Needs.COMPACT: option(11), Needs.PLAINTEXT: b""}[rule.needs]
    if number == Option.EXPORT_NAME:
        breach(b"\x00\x00\x00\x03" + before + option(number, data), words="extended headers")
    elif number == Option.STARTTLS:
        replies = negotiate(option(5), option(5), server=Server(tls=TlsMode.ALLOW))
        assert kinds(replies) == [OptionReply.ACK, "starttls", rule.otherwise]
    else:
        assert kinds(negotiate(before + option(number, data)))[-1] == rule.otherwise
        # The same for data of a wrong form: what is missing comes first.
        assert kinds(negotiate(before + option(number, b"\xff" * 9)))[-1] == rule.otherwise


def test_options_that_are_in_no_row_are_unknown() -> None:
    for number in [0, 4, *range(12, 20), 0x7FFFFFFF, 0xFFFFFFFF]:
        assert number not in OPTION_RULES
        events = negotiate(option(number, b"data") + contexts(9) + go())
        assert kinds(events)[0] == OptionReply.ERR_UNSUP
        assert events[0][1] == number
        assert kinds(events)[-1] == "opened"

"""Metadata contexts in the negotiation: LIST_META_CONTEXT and SET_META_CONTEXT.

Not covered: what the context says of a disk, which the export knows.
"""

from __future__ import annotations

import struct

import pytest

from nbdproxy.nbd.constants import OptionReply
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from tests.nbd import spec
from tests.nbd.wire import (
    SIZE,
    Server,
    contexts,
    counted,
    go,
    kinds,
    negotiate,
    option,
    query_body,
    request,
)

LIST, SET = 9, 10
BOTH = pytest.mark.parametrize("number", [LIST, SET])
CHUNKS = pytest.mark.parametrize("chunks", [8, 11])
ACK, CONTEXT = OptionReply.ACK, OptionReply.META_CONTEXT
INVALID, UNKNOWN = OptionReply.ERR_INVALID, OptionReply.ERR_UNKNOWN
ALLOCATION = b"base:allocation"


def asked(number: int, *queries: bytes, name: bytes = b"disk", chunks: int = 8) -> list[object]:
    """The kinds of the replies to a context option, chunks having been agreed on."""
    return kinds(negotiate(option(chunks) + contexts(number, name, *queries)))[1:]


def has_context(*options: bytes, name: bytes = b"disk", server: Server | None = None) -> bool:
    """Whether BLOCK_STATUS is accepted on an export that is opened after the options."""
    data = option(8) + b"".join(options) + go(name) + request(7, 0, 512)
    events = negotiate(data, server=server or Server())
    assert events[-1][0] in {"request", "refused"}
    return events[-1][0] == "request"


@BOTH
def test_without_chunks_there_are_no_contexts(number: int) -> None:
    assert kinds(negotiate(contexts(number, b"disk", ALLOCATION))) == [INVALID]


@CHUNKS
def test_the_one_context_is_listed_with_a_number_that_means_nothing(chunks: int) -> None:
    replies = negotiate(option(chunks) + contexts(LIST, b"disk"))
    assert replies[1:] == [
        ("reply", LIST, CONTEXT, bytes(4) + ALLOCATION),
        ("reply", LIST, ACK, b""),
    ]


@CHUNKS
def test_the_context_is_set_with_its_number(chunks: int) -> None:
    replies = negotiate(option(chunks) + contexts(SET, b"disk", ALLOCATION))
    assert replies[1:] == [
        ("reply", SET, CONTEXT, struct.pack(">I", spec.CONTEXT_ID) + ALLOCATION),
        ("reply", SET, ACK, b""),
    ]


@pytest.mark.parametrize(
    ("queries", "listed", "chosen"),
    [
        ([], True, False),
        ([b"base:"], True, False),
        ([ALLOCATION], True, True),
        ([ALLOCATION, ALLOCATION], True, True),
        ([b"base:", ALLOCATION], True, True),
        ([b"base:nothing"], False, False),
        ([b"base:allocation "], False, False),
        ([b"BASE:allocation"], False, False),
        ([b"base:allocation:depth"], False, False),
        ([b"qemu:dirty-bitmap:b0"], False, False),
        ([b"x-mine:", b"nbd-server:"], False, False),
        ([b":"], False, False),
        ([b"\xff\xfe:\x00"], False, False),
        ([b"qemu:", ALLOCATION, b"x-mine:"], True, True),
        ([b"x:" + b"y" * 4094], False, False),
    ],
)
def test_which_queries_find_the_context(queries: list[bytes], listed: bool, chosen: bool) -> None:
    assert asked(LIST, *queries) == [CONTEXT] * listed + [ACK]
    assert asked(SET, *queries) == [CONTEXT] * chosen + [ACK]
    assert has_context(contexts(SET, b"disk", *queries)) == chosen
    assert not has_context(contexts(LIST, b"disk", *queries))


@BOTH
@pytest.mark.parametrize("query", [b"", b"base", b"allocation", b"x:" + b"y" * 4095])
def test_a_query_without_namespace_or_too_long_is_invalid(number: int, query: bytes) -> None:
    assert asked(number, query) == [INVALID]
    assert asked(number, ALLOCATION, query) == [INVALID]


@BOTH
@pytest.mark.parametrize("name", [b"nothing", b"disk ", b"\xff", b"x" * 4097])
def test_contexts_of_an_unknown_export_are_not_known(number: int, name: bytes) -> None:
    assert asked(number, ALLOCATION, name=name) == [UNKNOWN]


MALFORMED = {
    "empty": b"",
    "no count": counted(b"disk"),
    "half a count": counted(b"disk") + bytes(3),
    "a name longer than the option": struct.pack(">I", 9) + b"disk",
    "a name length of 0xffffffff": b"\xff\xff\xff\xff" + bytes(8),
    "a query longer than the option": counted(b"disk") + struct.pack(">II", 1, 16) + ALLOCATION,
    "a query length of 0xffffffff": counted(b"disk") + b"\x00\x00\x00\x01\xff\xff\xff\xffbase:",
    "fewer queries than counted": counted(b"disk") + struct.pack(">I", 2) + counted(ALLOCATION),
    "more queries than counted": query_body(b"disk", ALLOCATION) + counted(ALLOCATION),
    "a count of 0xffffffff": counted(b"disk") + b"\xff\xff\xff\xff" + counted(ALLOCATION),
    "a byte behind": query_body(b"disk", ALLOCATION) + b"\x00",
}


@BOTH
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_lengths_that_disagree_are_invalid(number: int, body: bytes) -> None:
    assert kinds(negotiate(option(8) + option(number, body)))[1:] == [INVALID]


CHOSEN = contexts(SET, b"disk", ALLOCATION)
REPLACED = {
    "by none": contexts(SET, b"disk"),
    "by a wildcard": contexts(SET, b"disk", b"base:"),
    "by an unknown one": contexts(SET, b"disk", b"qemu:allocation-depth"),
    "by one of another export": contexts(SET, b"other", ALLOCATION),
    "by a query without namespace": contexts(SET, b"disk", b"allocation"),
    "by one of an unknown export": contexts(SET, b"nothing", ALLOCATION),
    **{f"by what is malformed: {how}": option(SET, body) for how, body in MALFORMED.items()},
}


@pytest.mark.parametrize("by", REPLACED.values(), ids=REPLACED.keys())
def test_a_set_replaces_what_was_set_even_when_it_fails(by: bytes) -> None:
    assert has_context(CHOSEN)
    assert not has_context(CHOSEN, by)
    assert has_context(by, CHOSEN)


def test_listing_replaces_nothing() -> None:
    assert has_context(CHOSEN, contexts(LIST, b"other", b"base:"), contexts(LIST, b"nothing"))


def test_contexts_are_of_one_export_only() -> None:
    of_other = contexts(SET, b"other", ALLOCATION)
    assert not has_context(of_other, name=b"disk")
    assert has_context(of_other, name=b"other")


@pytest.mark.parametrize(("chosen", "opened"), [(b"", b"disk"), (b"disk", b""), (b"", b"")])
def test_the_default_export_and_its_name_are_the_same(chosen: bytes, opened: bytes) -> None:
    assert has_context(contexts(SET, chosen, ALLOCATION), name=opened)


def test_two_exports_that_look_alike_are_still_two() -> None:
    one, two = (ExportInfo(name, SIZE, WRITABLE) for name in ("same", "same"))
    server = Server({"one": one, "two": two})
    chosen = contexts(SET, b"one", ALLOCATION)
    assert has_context(chosen, name=b"one", server=server)
    assert not has_context(chosen, name=b"two", server=server)


def test_a_refused_go_keeps_the_contexts() -> None:
    assert has_context(CHOSEN, go(b"nothing"), go(b"other", number=6))


def test_contexts_outlive_a_change_to_extended_headers() -> None:
    data = option(8) + CHOSEN + option(11) + go(b"disk") + request(7, 0, 512, style=spec.EXTENDED)
    assert negotiate(data)[-1][0] == "request"


def test_export_name_has_the_contexts_too() -> None:
    data = option(8) + CHOSEN + option(1, b"disk") + request(7, 0, 512)
    assert negotiate(data)[-1][0] == "request"

"""Replies in all three styles, read back by `decode`, which knows the specification by itself.

Not covered: READs of data and holes, which have test_holes; who sends the bytes.
"""

from __future__ import annotations

import pytest

from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.replies import Replies
from nbdproxy.requests import NbdErrno, Request
from tests.nbd import spec
from tests.nbd.decode import Answer, Sent, decode

STYLES = pytest.mark.parametrize("style", ReplyStyle)
CHUNKED = pytest.mark.parametrize("style", [ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED])
NOTHING = memoryview(b"")
COOKIE = 0x0102030405060708


def asked(command: int, *, cookie: int = COOKIE, offset: int = 4096, length: int = 4096) -> Request:
    return Request(command, 0, cookie, offset, length, NOTHING)


def stream(replies: Replies) -> bytes:
    return b"".join(bytes(part) for part in replies.take())


def one(replies: Replies, request: Request, style: int) -> Answer:
    """What the one request that was answered is told."""
    return decode(stream(replies), style, [Sent(*request[:5])])[request.cookie]


WIRE = {
    ReplyStyle.SIMPLE: {
        "done": "67446698 00000000 0102030405060708",
        "fail": "67446698 0000001c 0102030405060708",
        "read": "67446698 00000000 0102030405060708 ffff",
    },
    ReplyStyle.STRUCTURED: {
        "done": "67446698 00000000 0102030405060708",
        "fail": "668e33ef 0001 8001 0102030405060708 0000000a 0000001c 0004 66756c6c",
        "read": "668e33ef 0001 0001 0102030405060708 0000000a 0000000000001000 ffff",
    },
    ReplyStyle.EXTENDED: {
        "done": "6e8a278c 0001 0000 0102030405060708 0000000000001000 0000000000000000",
        "fail": "6e8a278c 0001 8001 0102030405060708 0000000000001000 000000000000000a"
        "0000001c 0004 66756c6c",
        "read": "6e8a278c 0001 0001 0102030405060708 0000000000001000 000000000000000a"
        "0000000000001000 ffff",
    },
}


@STYLES
def test_replies_have_their_wire_form(style: ReplyStyle) -> None:
    replies = Replies(style)
    replies.done(asked(1))
    assert stream(replies).hex() == WIRE[style]["done"].replace(" ", "")
    replies.fail(asked(1), NbdErrno.ENOSPC, "full")
    assert stream(replies).hex() == WIRE[style]["fail"].replace(" ", "")
    read = asked(0, length=2)
    replies.reserve_read(read)[:] = b"\xff\xff"
    replies.finish_read(read)
    assert stream(replies).hex() == WIRE[style]["read"].replace(" ", "")


@CHUNKED
def test_a_status_has_its_wire_form(style: ReplyStyle) -> None:
    replies = Replies(style)
    replies.status(asked(7), [(4096, 3), (512, 0)])
    form = {
        ReplyStyle.STRUCTURED: "668e33ef 0001 0005 0102030405060708 00000014 00000001"
        "00001000 00000003 00000200 00000000",
        ReplyStyle.EXTENDED: "6e8a278c 0001 0006 0102030405060708 0000000000001000"
        "0000000000000028 00000001 00000002"
        "0000000000001000 0000000000000003 0000000000000200 0000000000000000",
    }[style]
    assert stream(replies).hex() == form.replace(" ", "")


@STYLES
@pytest.mark.parametrize("command", [number for number in spec.COMMANDS if number not in {0, 7}])
def test_success_without_data(style: ReplyStyle, command: int) -> None:
    replies = Replies(style)
    replies.done(asked(command))
    assert one(replies, asked(command), style) == Answer(done=True)


@STYLES
@pytest.mark.parametrize("command", [*spec.COMMANDS, 8, 99])
@pytest.mark.parametrize("error", [error for error in NbdErrno if error])
def test_every_error_of_every_command(style: ReplyStyle, command: int, error: int) -> None:
    replies = Replies(style)
    replies.fail(asked(command), error, "why not")
    answer = one(replies, asked(command), style)
    assert (answer.error, bytes(answer.data)) == (error, b"")
    assert answer.text == ("why not" if style is not ReplyStyle.SIMPLE else "")


@CHUNKED
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ""),
        ("x" * 900, "x" * 900),
        ("x" * 901, "x" * 900),
        ("x" * 100_000, "x" * 900),
        ("schön", "schön"),
        ("a name \udcff", "a name ?"),
        ("x" + "é" * 900, "x" + "é" * 449),
        ("😀" * 226, "😀" * 225),
        ("xx" + "😀" * 225, "xx" + "😀" * 224),
    ],
    ids=range(9),
)
def test_the_text_of_an_error_is_at_most_900_bytes_of_utf_8(
    style: ReplyStyle, text: str, told: str
) -> None:
    replies = Replies(style)
    replies.fail(asked(1), NbdErrno.EIO, text)
    assert one(replies, asked(1), style).text == told


EXTENTS = {
    "one": [(4096, 0)],
    "several": [(4096, 3), (512, 0), (2**20, 2), (4096, 1)],
    "as many as we send": [(512, n % 4) for n in range(1024)],
    "all that 32 bits hold": [(2**32 - 65536, 3)],
}


@CHUNKED
@pytest.mark.parametrize("extents", EXTENTS.values(), ids=EXTENTS.keys())
def test_extents_are_told_as_they_are(style: ReplyStyle, extents: list[tuple[int, int]]) -> None:
    request = asked(7, length=sum(length for length, _ in extents))
    replies = Replies(style)
    replies.status(request, extents)
    assert one(replies, request, style).extents == extents


LONG = [2**32 - 65536 + 512, 2**32 - 512, 2**32, 2**32 + 512, 2**33, 2**63 - 512]


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("before", [[], [(512, 0)], [(2**32 - 65536, 0)]], ids=len)
def test_a_long_extent_is_cut_for_structured_replies_and_ends_them(
    length: int, before: list[tuple[int, int]]
) -> None:
    extents = [*before, (length, 3), (512, 0)]
    request = asked(7, length=2**32 - 512)
    replies = Replies(ReplyStyle.STRUCTURED)
    replies.status(request, extents)
    # Cut to whole blocks of any size that the specification allows, and nothing behind it.
    block = 64 * 1024
    answer = decode(stream(replies), 1, [Sent(7, 0, COOKIE, 4096, 2**40)], min_block=512)[COOKIE]
    assert answer.extents[:-1] == before
    told, flags = answer.extents[-1]
    assert (told % block, flags) == (0, 3)
    assert 2**32 - 2 * block <= told <= min(length, 2**32 - 1)


@pytest.mark.parametrize("length", LONG)
def test_a_long_extent_is_exact_with_extended_headers(length: int) -> None:
    extents = [(512, 0), (length, 3), (512, 0)]
    replies = Replies(ReplyStyle.EXTENDED)
    replies.status(asked(7), extents)
    request = Sent(7, 0, COOKIE, 4096, 2**64 - 512)
    assert decode(stream(replies), 2, [request])[COOKIE].extents == extents


@STYLES
def test_a_batch_is_answered_in_order_and_taken_once(style: ReplyStyle) -> None:
    replies = Replies(style, arena=64)
    sent = []
    for cookie, command in enumerate([1, 0, 3, 0, 6, 1, 0]):
        request = asked(command, cookie=cookie, length=512)
        sent.append(Sent(*request[:5]))
        if command == 0:
            replies.reserve_read(request)[:] = bytes([cookie]) * 512
            replies.finish_read(request)
        elif cookie % 2:
            replies.fail(request, NbdErrno.EIO, "bad sector")
        else:
            replies.done(request)
    answers = decode(stream(replies), style, sent)
    assert [bytes(answers[n].data) for n in (1, 3, 6)] == [bytes([n]) * 512 for n in (1, 3, 6)]
    assert [answers[n].error for n in (0, 2, 4, 5)] == [0, 0, 0, 5]
    assert replies.take() == []


@STYLES
def test_a_read_that_is_taken_back_leaves_nothing(style: ReplyStyle) -> None:
    for arena in (64, 4096, 1 << 20):
        replies = Replies(style, arena=arena)
        done, read = asked(1, cookie=1), asked(0, cookie=2)
        replies.done(done)
        replies.reserve_read(read)[:] = b"\xee" * read.length
        replies.take_back_read(read)
        replies.fail(read, NbdErrno.EIO, "unreadable")
        replies.done(asked(1, cookie=3))
        sent = [Sent(*request[:5]) for request in (done, read, asked(1, cookie=3))]
        answers = decode(stream(replies), style, sent)
        assert [answers[n].error for n in (1, 2, 3)] == [0, 5, 0]


@STYLES
def test_a_read_that_is_taken_back_alone_sends_nothing(style: ReplyStyle) -> None:
    replies = Replies(style)
    replies.reserve_read(asked(0))
    replies.take_back_read(asked(0))
    assert stream(replies) == b""


@STYLES
def test_nothing_of_one_batch_shows_in_the_next(style: ReplyStyle) -> None:
    replies = Replies(style, arena=1024)
    for cookie in range(50):
        request = asked(0, cookie=cookie, length=512)
        data = bytes([cookie % 3]) * 512
        replies.reserve_read(request)[:] = data
        replies.finish_read(request)
        answer = decode(stream(replies), style, [Sent(*request[:5])])[cookie]
        assert answer.data == data

"""READs of data and zeroes in all three styles: whatever becomes a hole, the same bytes come back.

Every picture of up to ten blocks is sent, at places on the disk that are and are not whole blocks,
through buffers in which it does and does not fit.

Not covered: holes that a disk knows of; the replies look at the data alone.
"""

from __future__ import annotations

import itertools
import random

import pytest

from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.replies import Replies
from nbdproxy.requests import NbdErrno, Request
from tests.nbd import decode, spec
from tests.nbd.decode import Answer, Sent

STYLES = pytest.mark.parametrize("style", ReplyStyle)
CHUNKED = pytest.mark.parametrize("style", [ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED])
BLOCK = 4096
NOTHING = memoryview(b"")
DISK = random.Random(20).randbytes(64 * BLOCK)


def read(
    style: int, data: bytes, *, offset: int = 0, flags: int = 0, arena: int = 1 << 20
) -> tuple[Answer, int]:
    """What a READ of `data` is told, between two other replies; and the bytes it took."""
    replies = Replies(ReplyStyle(style), arena=arena)
    request = Request(0, flags, 2, offset, len(data), NOTHING)
    others = [Request(1, 0, cookie, 0, 512, NOTHING) for cookie in (1, 3)]
    replies.done(others[0])
    replies.reserve_read(request)[:] = data
    replies.finish_read(request)
    replies.fail(others[1], NbdErrno.EIO, "broken")
    stream = b"".join(bytes(part) for part in replies.take())
    sent = [Sent(*asked[:5]) for asked in (*others, request)]
    answers = decode.decode(stream, style, sent)
    assert [answers[n].error for n in (1, 3)] == [0, spec.EIO]
    return answers[2], len(stream)


def picture(blocks: tuple[int, ...], head: int = 0, tail: int = 0) -> bytes:
    """Blocks that are zero where there is a 0, and data at the ends that are no whole blocks."""
    data = b"".join(
        DISK[n * BLOCK : (n + 1) * BLOCK] if full else bytes(BLOCK) for n, full in enumerate(blocks)
    )
    return DISK[:head] + data + DISK[-tail:] * bool(tail)


@STYLES
@pytest.mark.parametrize("count", range(1, 11))
def test_every_picture_of_blocks_comes_back_as_it_was(style: ReplyStyle, count: int) -> None:
    for blocks in itertools.product((0, 1), repeat=count):
        data = picture(blocks)
        answer, size = read(style, data)
        assert answer.data == data
        runs = [full for full, _ in itertools.groupby(blocks)]
        if style is ReplyStyle.SIMPLE:
            assert len(answer.pieces) == 1
            continue
        expected = [decode.DATA if full else decode.HOLE for full in runs]
        assert [kind for kind, _, _ in answer.pieces] == expected
        assert size < BLOCK * sum(blocks) + 100 + 60 * len(runs)


@CHUNKED
@pytest.mark.parametrize("head", [0, 1, 512, 3584])
@pytest.mark.parametrize("tail", [0, 1, 3584])
@pytest.mark.parametrize("zero_ends", [False, True])
def test_holes_are_whole_blocks_of_the_disk(
    style: ReplyStyle, head: int, tail: int, zero_ends: bool
) -> None:
    offset = 10 * BLOCK - head
    for blocks in itertools.product((0, 1), repeat=4):
        data = picture(blocks, head, tail)
        if zero_ends:
            data = bytes(head) + data[head : len(data) - tail] + bytes(tail)
        answer, _ = read(style, data, offset=offset)
        assert answer.data == data
        for kind, at, length in answer.pieces:
            if kind == decode.HOLE and length < len(data):
                assert at % BLOCK == length % BLOCK == 0


@STYLES
def test_holes_at_every_sector_come_back_as_they_were(style: ReplyStyle) -> None:
    sectors = 40
    for start in range(sectors):
        for length in (1, 7, 8, 9, 15, 16, 17, sectors):
            data = bytearray(DISK[: sectors * 512])
            end = min((start + length) * 512, len(data))
            data[start * 512 : end] = bytes(end - start * 512)
            for offset in (0, 512, 7 * 512):
                assert read(style, bytes(data), offset=offset)[0].data == data


@STYLES
@pytest.mark.parametrize("arena", [0, 1, 100, 2 * BLOCK, 3 * BLOCK + 33, 5 * BLOCK])
def test_a_buffer_of_any_size_will_do(style: ReplyStyle, arena: int) -> None:
    for blocks in itertools.product((0, 1), repeat=5):
        data = picture(blocks)
        assert read(style, data, arena=arena)[0].data == data


@STYLES
@pytest.mark.parametrize("length", [512, 1024, BLOCK, BLOCK + 512, 64 * 1024, 200 * 1024])
def test_what_is_all_zero_is_one_hole_however_short(style: ReplyStyle, length: int) -> None:
    answer, size = read(style, bytes(length), offset=512)
    assert answer.data == bytes(length)
    if style is not ReplyStyle.SIMPLE:
        assert answer.pieces == [(decode.HOLE, 512, length)]
        assert size < 200


@CHUNKED
@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("arena", [0, 44, 45, 60, 80, 1000])
def test_a_few_zeroes_are_no_hole_where_that_would_be_longer(
    style: ReplyStyle, length: int, arena: int
) -> None:
    answer, size = read(style, bytes(length), offset=7, arena=arena)
    assert answer.data == bytes(length)
    assert answer.pieces == [(decode.HOLE if length >= 4 else decode.DATA, 7, length)]
    assert size <= read(style, b"\1" * length, offset=7, arena=arena)[1]


@CHUNKED
@pytest.mark.parametrize("at", [0, 511, 512, 65_535, 65_536, 65_537, 131_071])
def test_a_single_byte_that_is_not_zero_is_not_lost(style: ReplyStyle, at: int) -> None:
    data = bytearray(128 * 1024)
    data[at] = 1
    for flags in (0, spec.DF):
        assert read(style, bytes(data), flags=flags)[0].data == data


@CHUNKED
@pytest.mark.parametrize("count", range(1, 7))
def test_df_is_answered_in_one_piece(style: ReplyStyle, count: int) -> None:
    # `decode` refuses more than one content chunk; a hole is one only where all is zero.
    for blocks in itertools.product((0, 1), repeat=count):
        data = picture(blocks)
        answer, _ = read(style, data, flags=spec.DF)
        kind = decode.DATA if any(blocks) else decode.HOLE
        assert answer.pieces == [(kind, 0, len(data))]
        assert answer.data == data


@STYLES
def test_the_largest_read_with_and_without_holes(style: ReplyStyle) -> None:
    data = bytearray(spec.MAX_PAYLOAD)
    data[BLOCK : 2 * BLOCK] = data[-BLOCK:] = DISK[:BLOCK]
    for content in (bytes(data), bytes(len(data)), b"\x01" * len(data)):
        answer, _ = read(style, content, offset=2**62)
        assert answer.data == content


@STYLES
def test_many_reads_in_one_batch(style: ReplyStyle) -> None:
    rng = random.Random(7)
    replies = Replies(style, arena=8 * BLOCK)
    sent, expected = [], {}
    for cookie in range(200):
        length, offset = 512 * rng.randint(1, 40), 512 * rng.randint(0, 100)
        flags = spec.DF * rng.randint(0, 1) if style is not ReplyStyle.SIMPLE else 0
        request = Request(0, flags, cookie, offset, length, NOTHING)
        place = replies.reserve_read(request)
        if rng.random() < 0.1:
            replies.take_back_read(request)
            replies.fail(request, NbdErrno.EIO, "broken")
            expected[cookie] = b""
        else:
            sectors = (rng.choice((bytes(512), DISK[:512])) for _ in range(length // 512))
            expected[cookie] = b"".join(sectors)
            place[:] = expected[cookie]
            replies.finish_read(request)
        sent.append(Sent(*request[:5]))
    stream = b"".join(bytes(part) for part in replies.take())
    answers = decode.decode(stream, style, sent)
    assert {cookie: bytes(answer.data) for cookie, answer in answers.items()} == expected

"""Garbage from a server gives events or a breach; nothing else is raised, and `needed` is bounded.

Streams are random bytes, streams that were right once, and replies whose fields are drawn at will,
so that every phase is reached with what is almost right. That the data which is reported lies in
the request and never comes twice is checked here too, whatever the server sends.
"""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.nbd.client import ClientConnection, ClientPhase
from nbdproxy.nbd.constants import ReplyStyle
from tests.nbd import client_wire as wire
from tests.nbd.client_wire import EXTENDED, SIMPLE, SIZE, STRUCTURED, Plain, chunk, pour, reply

ASKED = [
    (wire.READ, 512, 1024),
    (wire.READ, 0, 600, wire.DF),
    (wire.WRITE, 0, 512),
    (wire.FLUSH, 0, 0),
    (wire.BLOCK_STATUS, 512, 2048),
    (wire.BLOCK_STATUS, 0, 512, wire.REQ_ONE),
    (wire.READ, SIZE - 600, 600),
]
styles = st.sampled_from(ReplyStyle)
u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
places = st.sampled_from([0, 1, 100, 512, 600, 1024, 1536, SIZE - 600]) | u64
amounts = st.sampled_from([0, 1, 88, 100, 500, 512, 1024]) | u32
options = st.builds(
    reply,
    st.sampled_from([1, 5, 7, 7, 8, 10, 11]),
    st.sampled_from([1, 1, 3, 3, 4, 2**31 + 1, 2**31 + 2, 2**31 + 6]) | u32,
    st.sampled_from(
        [
            b"",
            b"\0\0\0\x05base:allocation",
            struct.pack(">HQH", 0, SIZE, 1),
            struct.pack(">HIII", 3, 1, 4096, 2**25),
        ]
    )
    | st.binary(max_size=20),
)


@st.composite
def payloads(draw: st.DrawFn, style: ReplyStyle, asked: tuple[int, ...]) -> tuple[int, bytes]:
    """A type and a payload that answer a request, or nearly so."""
    command, offset, length = asked[:3]
    # Few places and sizes, so that chunks often meet, overlap, or cover all of a request.
    place = offset + draw(st.integers(-1, 11)) * 100
    size = draw(st.sampled_from([100, 200, 300, length, offset + length - place]))
    if draw(st.integers(0, 9)) == 0:
        place, size = draw(places), draw(amounts)
    place, size = place % 2**64, size % 2**32
    if command == wire.READ and draw(st.integers(0, 5)):
        if draw(st.booleans()):
            return wire.HOLE, wire.hole(place, size)
        return wire.DATA, wire.data(place, b"d" * min(size, 1500))
    if command == wire.BLOCK_STATUS and draw(st.integers(0, 3)):
        extents = draw(st.lists(st.tuples(amounts, st.integers(0, 3)), min_size=1, max_size=3))
        number = draw(st.sampled_from([wire.CONTEXT] * 8 + [0]))
        kind = wire.STATUS_EXT if style is EXTENDED else wire.STATUS
        return kind, wire.status(extents, style=style, number=number)
    if draw(st.booleans()):
        return wire.NONE, b""
    lie = draw(st.sampled_from([4, 4, 4, 5, 4097]))
    error = wire.error(draw(st.sampled_from([5, 5, 0]) | u32), b"text", length=lie)
    kind = draw(st.sampled_from([wire.ERROR, 0xFFFF, wire.ERROR_OFFSET]))
    return kind, error + (struct.pack(">Q", place) if kind == wire.ERROR_OFFSET else b"")


@st.composite
def replies(draw: st.DrawFn, style: ReplyStyle) -> bytes:
    """One reply, or one chunk of it, that is right or nearly so."""
    cookie = draw(st.integers(1, len(ASKED)))
    asked = ASKED[cookie - 1]
    cookie = draw(st.sampled_from([cookie] * 15 + [0]))
    if style is SIMPLE or draw(st.integers(0, 9)) == 0:
        content = b"x" * asked[2] if asked[0] == wire.READ else b""
        return wire.simple(cookie, draw(st.sampled_from([0, 0, 5]) | u32), content)
    kind, body = draw(payloads(style, asked))
    return chunk(
        draw(st.sampled_from([kind] * 15 + [wire.DATA, 7])),
        body,
        style=style,
        flags=1 if kind == wire.NONE else draw(st.sampled_from([0, 0, 0, 1])),
        cookie=cookie,
        offset=draw(st.sampled_from([asked[1]] * 15 + [0])),
        length=draw(st.sampled_from([None] * 15 + [0])),
    )


@st.composite
def streams(draw: st.DrawFn) -> tuple[ReplyStyle, bool, bytes]:
    """A style, whether requests are in flight already, and bytes; perhaps changed, perhaps cut."""
    style, flying = draw(styles), draw(st.booleans())
    if flying:
        good = b"".join(draw(st.lists(replies(style), max_size=10)))
    elif draw(st.booleans()):
        good = wire.opening(style)
    else:
        good = wire.greeting() + b"".join(draw(st.lists(options, max_size=6)))
    stream = bytearray(good + draw(st.just(b"") | st.binary(max_size=40)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        if stream:
            stream[draw(st.integers(0, len(stream) - 1))] = draw(st.integers(0, 255))
    return style, flying, bytes(stream)


def fresh(style: ReplyStyle, flying: bool) -> ClientConnection:
    return wire.asking(*ASKED, style=style)() if flying else ClientConnection("disk")


@given(streams(), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_garbage_gives_events_or_a_breach_however_it_is_fed(
    case: tuple[ReplyStyle, bool, bytes], step: int
) -> None:
    style, flying, stream = case
    whole, rest = pour(fresh(style, flying), stream, max(len(stream), 1))
    for size in (1, step):
        pieces, left = pour(fresh(style, flying), stream, size)
        assert (pieces[:2], left) == (whole[:2], rest)
    if flying:
        check_content(whole.events)
    whole.connection.server_closed()
    assert whole.connection.phase is ClientPhase.CLOSED
    assert whole.breach.isprintable()


def check_content(events: list[Plain]) -> None:
    """Check that what is reported of each request is what its caller may rely on."""
    seen: dict[int, set[int]] = {}
    finished: set[int] = set()
    for name, cookie, *rest in events:
        assert isinstance(cookie, int)
        assert cookie not in finished
        _, offset, length, *flags = ASKED[cookie - 1]
        match name, rest:
            case ("DataReceived", [int(at), bytes(data)]):
                content = range(at, at + len(data))
            case ("HoleReceived", [int(at), int(size)]):
                content = range(at, at + size)
            case ("StatusReceived", [tuple(extents)]):
                assert extents
                assert all(size > 0 for size, _ in extents)
                assert offset + sum(size for size, _ in extents) <= SIZE
                assert not flags or (len(extents) == 1 and extents[0][0] <= length)
                content = range(0)
            case ("Finished", [int(error), str()]):
                finished.add(cookie)
                whole = set(range(offset, offset + length))
                read = ASKED[cookie - 1][0] == wire.READ
                assert error or not read or seen.get(cookie, set()) == whole
                continue
            case _:
                raise AssertionError(name)
        before = seen.setdefault(cookie, set())
        assert not before & set(content)
        assert offset <= content.start <= content.stop <= offset + length or not content
        before |= set(content)


@given(st.binary(max_size=100))
@settings(max_examples=300, deadline=None)
def test_noise_is_no_server(stream: bytes) -> None:
    whole, _ = pour(ClientConnection("disk"), stream, max(len(stream), 1))
    assert whole.breach or len(stream) < 18


headers = st.tuples(u16, u16, st.integers(0, 8), u64 | st.just(512))


@given(st.sampled_from([STRUCTURED, EXTENDED]), headers, u64)
@settings(max_examples=400, deadline=None)
def test_no_header_makes_anybody_wait_for_more_than_was_asked(
    style: ReplyStyle, fields: tuple[int, int, int, int], length: int
) -> None:
    drawn, flags, cookie, offset = fields
    for lengths in (length % 2**15, length if style is EXTENDED else length % 2**32):
        for kind in (drawn, drawn % 8, drawn | 0x8000):
            header = chunk(
                kind, style=style, flags=flags, cookie=cookie, offset=offset, length=lengths
            )
            connection = wire.asking(*ASKED, style=style)()
            connection.receive(memoryview(header))
            assert connection.needed <= 32 + 8 + 16 * 2048

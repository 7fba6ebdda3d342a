"""Garbage either parses or is a breach; nothing is raised, and never is more used than was given.

Streams are random bytes, and broken streams that were right once, so that every phase is reached in
every style. What comes before a breach is the same too, however the bytes arrive.

Not covered: what an accepted request must look like; the fuzzer (tests/fuzz) has that.
"""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.nbd.constants import TlsMode
from tests.nbd import spec
from tests.nbd.wire import (
    EXTENDED_REQUEST_MAGIC,
    FLAGS,
    IHAVEOPT,
    REQUEST_MAGIC,
    Server,
    contexts,
    go,
    info_body,
    opening,
    option,
    pour,
    request,
)

numbers = st.integers(0, 12)
names = st.sampled_from([b"", b"disk", b"other", b"nothing", b"\xff"])
queries = st.lists(st.sampled_from([spec.CONTEXT, b"base:", b"x:y", b"base"]), max_size=3)
options = st.one_of(
    st.builds(option, numbers, st.binary(max_size=40)),
    st.builds(option, numbers, st.binary(max_size=8), length=st.integers(0, 700)),
    st.builds(option, st.sampled_from([3, 8, 11])),
    st.builds(
        lambda number, name, infos: option(number, info_body(name, infos)),
        st.sampled_from([6, 7]),
        names,
        st.lists(st.integers(0, 9), max_size=4),
    ),
    st.builds(
        lambda number, name, asked: contexts(number, name, *asked),
        st.sampled_from([9, 10]),
        names,
        queries,
    ),
)
commands = st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 7, 9])
offsets = st.integers(0, 2**64 - 1) | st.sampled_from([0, 512, 1024])
lengths = st.sampled_from([0, 1, 12, 512, 1024])
flags = st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32, 33, 40])
filters = st.builds(
    lambda length, ids: struct.pack(f">Q{len(ids)}I", length, *ids),
    offsets,
    st.lists(st.integers(0, 2), max_size=3),
)


def sent(style: int) -> st.SearchStrategy[bytes]:
    """A request with these headers; with extended ones, any may have a payload."""

    def build(command: int, offset: int, length: int, flag: int, asked: bytes) -> bytes:
        if style == spec.EXTENDED and command == 7 and flag & spec.PAYLOAD_LEN:
            return request(7, offset, len(asked), flags=flag, payload=asked, style=style)
        full = flag & spec.PAYLOAD_LEN if style == spec.EXTENDED else command == 1
        payload = b"p" * length if full else b""
        return request(command, offset, length, flags=flag, payload=payload, style=style)

    return st.builds(build, commands, offsets, lengths, flags, filters)


def session(style: int) -> st.SearchStrategy[bytes]:
    """A negotiation that leads to this style, and requests."""
    return st.builds(
        lambda before, hello, parts: FLAGS + b"".join(before) + hello[4:] + b"".join(parts),
        st.lists(options, max_size=2),
        st.builds(
            lambda chosen: opening(style, with_contexts=chosen and style != spec.SIMPLE),
            st.booleans(),
        ),
        st.lists(sent(style), max_size=8),
    )


streams = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda parts: FLAGS + b"".join(parts), st.lists(options, max_size=6)),
    *(session(style) for style in (spec.SIMPLE, spec.STRUCTURED, spec.EXTENDED)),
    st.builds(lambda tail: FLAGS + struct.pack(">Q", IHAVEOPT) + tail, st.binary(max_size=64)),
    st.builds(
        lambda tail: FLAGS + go() + struct.pack(">I", REQUEST_MAGIC) + tail,
        st.binary(max_size=64),
    ),
    st.builds(
        lambda tail: opening(2) + struct.pack(">I", EXTENDED_REQUEST_MAGIC) + tail,
        st.binary(max_size=64),
    ),
)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A stream, perhaps with some bytes changed and its end cut off."""
    data = bytearray(draw(streams))
    for _ in range(draw(st.integers(0, 2))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@st.composite
def parts_of(draw: st.DrawFn) -> tuple[tuple[bytes, ...], Server]:
    """A stream and the server it goes to; with TLS, its first part ends in a STARTTLS."""
    tls = draw(st.sampled_from(TlsMode))
    if tls is TlsMode.OFF or not draw(st.booleans()):
        return (draw(broken()),), Server(tls=tls)
    before = FLAGS + b"".join(draw(st.lists(st.builds(option, st.sampled_from([3, 8, 11, 99])))))
    return (before + option(5), draw(broken())[4:]), Server(tls=tls)


@given(parts_of(), st.integers(1, 50))
@settings(max_examples=500, deadline=None)
def test_garbage_parses_or_is_a_breach_however_it_is_fed(
    case: tuple[tuple[bytes, ...], Server], step: int
) -> None:
    parts, server = case
    whole = pour(parts, max(len(part) for part in parts) or 1, server).outcome
    assert pour(parts, 1, server).outcome == whole
    assert pour(parts, step, server).outcome == whole

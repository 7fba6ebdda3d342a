"""Garbage either parses or is a breach; nothing is raised, and never is more used than was given.

Streams are random bytes, and broken streams that were right once, so that every phase is reached.
What comes before a breach is the same too, however the bytes arrive.
"""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.nbd.constants import IHAVEOPT, REQUEST_MAGIC, Option
from nbdproxy.requests import Command
from tests.nbd.wire import FLAGS, Plain, go, info_body, option, pour_into, request

small = st.integers(0, 700)
options = st.one_of(
    st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(option, st.integers(0, 12), st.binary(max_size=8), length=small),
    st.builds(
        lambda number, name, infos: option(number, info_body(name, infos)),
        st.sampled_from([Option.GO, Option.INFO]),
        st.sampled_from([b"", b"disk", b"other", b"nothing", b"\xff"]),
        st.lists(st.integers(0, 9), max_size=4),
    ),
)
requests = st.builds(
    lambda command, offset, length, flags: request(
        command,
        offset,
        length,
        flags=flags,
        payload=b"p" * length if command == Command.WRITE else b"",
    ),
    st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 9]),
    st.integers(0, 2**64 - 1) | st.sampled_from([0, 512, 1024]),
    st.sampled_from([0, 1, 512, 1024]),
    st.sampled_from([0, 0, 0, 1, 2, 3]),
)
streams = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda parts: FLAGS + b"".join(parts), st.lists(options, max_size=5)),
    st.builds(
        lambda before, parts: FLAGS + b"".join(before) + go() + b"".join(parts),
        st.lists(options, max_size=2),
        st.lists(requests, max_size=8),
    ),
    st.builds(lambda tail: FLAGS + struct.pack(">Q", IHAVEOPT) + tail, st.binary(max_size=64)),
    st.builds(
        lambda tail: FLAGS + go() + struct.pack(">I", REQUEST_MAGIC) + tail,
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


def parsed(data: bytes, step: int) -> tuple[list[Plain], bytes, str]:
    """What the bytes meant, what was left over, and how they broke the protocol, if they did."""
    events: list[Plain] = []
    rest, connection = pour_into(events, data, step)
    return events, rest, str(connection.breach or "")


@given(broken(), st.integers(1, 50))
@settings(max_examples=1000, deadline=None)
def test_garbage_parses_or_is_a_breach_however_it_is_fed(data: bytes, step: int) -> None:
    whole = parsed(data, max(len(data), 1))
    assert parsed(data, 1) == whole
    assert parsed(data, step) == whole

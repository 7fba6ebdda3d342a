"""The condition of one file, from its content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.oracles.condition import Condition, classify
from nbdproxy.oracles.manifest import Entry

CONTENT = bytes(range(1, 251)) * 40  # 10,000 bytes without a zero


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def condition(
    found: bytes,
    expected: bytes = CONTENT,
    *,
    size_known: bool = True,
    earlier: Sequence[bytes] = (),
) -> Condition:
    entry = Entry("/f", digest(expected), len(expected) if size_known else None)
    return classify(entry, len(found), [found], [digest(data) for data in earlier])


ZERO_START = bytes(4096) + CONTENT[4096:]
ZERO_TAIL = CONTENT[:8192] + bytes(len(CONTENT) - 8192)
ZERO_ACROSS = CONTENT[:100] + bytes(4096) + CONTENT[4196:]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (CONTENT, Condition.WHOLE),
        (b"", Condition.EMPTY),
        (bytes(len(CONTENT)), Condition.ZEROED),
        (ZERO_START, Condition.PARTLY_ZEROED),
        (ZERO_TAIL, Condition.PARTLY_ZEROED),
        (ZERO_ACROSS, Condition.DAMAGED),
        (CONTENT[:-1] + b"x", Condition.DAMAGED),
        (CONTENT[:-1], Condition.SHORT),
        (bytes(100), Condition.SHORT),
        (CONTENT + b"x", Condition.DAMAGED),
    ],
)
def test_conditions(found: bytes, expected: Condition) -> None:
    assert condition(found) is expected


def test_without_a_size_only_what_is_certain_is_said() -> None:
    assert condition(CONTENT, size_known=False) is Condition.WHOLE
    assert condition(CONTENT[:-1], size_known=False) is Condition.DAMAGED
    assert condition(bytes(7), size_known=False) is Condition.ZEROED
    assert condition(b"", size_known=False) is Condition.EMPTY


def test_what_should_be_empty_or_zero_is_whole_that_way() -> None:
    assert condition(b"", b"") is Condition.WHOLE
    assert condition(bytes(9000), bytes(9000)) is Condition.WHOLE
    assert condition(b"x", b"") is Condition.DAMAGED


def test_an_earlier_version_is_stale_whatever_its_length() -> None:
    for earlier in (CONTENT[:50], CONTENT + b"y", bytes(len(CONTENT)), CONTENT[::-1]):
        assert condition(earlier, earlier=[b"another", earlier]) is Condition.STALE
    assert condition(b"", earlier=[b""]) is Condition.EMPTY
    assert condition(CONTENT[:50], earlier=[b"another"]) is Condition.SHORT


def test_earlier_versions_are_known_whatever_digest_the_manifest_has() -> None:
    expected = hashlib.md5(CONTENT).hexdigest()
    entry = Entry("/f", expected, len(CONTENT), algorithm="md5")
    earlier = [digest(b"earlier")]
    assert classify(entry, len(CONTENT), [CONTENT], earlier) is Condition.WHOLE
    assert classify(entry, 7, [b"earlier"], earlier) is Condition.STALE
    assert classify(entry, 7, [b"another"], earlier) is Condition.SHORT


@given(
    st.sampled_from([CONTENT, ZERO_START, ZERO_TAIL, ZERO_ACROSS, bytes(len(CONTENT))]),
    st.lists(st.integers(0, len(CONTENT)), max_size=8),
)
def test_the_pieces_of_the_stream_do_not_matter(found: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(found)]
    pieces = [found[a:b] for a, b in pairwise(edges)]
    entry = Entry("/f", digest(CONTENT), len(CONTENT))
    assert classify(entry, len(found), pieces) is condition(found)


def test_a_file_of_the_wrong_length_is_not_read() -> None:
    def trap() -> Iterator[bytes]:
        raise AssertionError("read although its length says it all")
        yield b""

    entry = Entry("/f", digest(CONTENT), len(CONTENT))
    assert classify(entry, 1 << 60, trap()) is Condition.DAMAGED

"""`PayloadIndex` against looking through all rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.recording.payloads import PayloadIndex


def index_of(lengths: list[int], gap: int) -> tuple[PayloadIndex, list[int]]:
    """Events with payloads of these lengths (0: none), each behind a gap; their positions."""
    at, positions = 0, []
    for length in lengths:
        at += gap
        positions.append(at if length else -1)
        at += length
    columns = (range(100, 100 + len(lengths)), positions, lengths)
    return PayloadIndex(*(np.array(list(column), np.int64) for column in columns)), positions


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 0, 1, 5]), max_size=30), st.integers(0, 2))
def test_it_names_the_event_that_a_position_is_in(lengths: list[int], gap: int) -> None:
    # More rows than one step of the index, and a long run without any payload.
    lengths = [*lengths, *[0] * 2500, *lengths, 3, *[0] * 1500]
    index, positions = index_of(lengths, gap)
    expected = {
        at + byte: (row, 100 + row)
        for row, (at, length) in enumerate(zip(positions, lengths, strict=True))
        for byte in range(length)
    }
    for position in range(max(positions) + 6):
        assert index.unverified(position) == expected.get(position)


def test_what_was_verified_is_not_named_again() -> None:
    index, _ = index_of([4, 4], 0)
    assert index.unverified(5) == (1, 101)
    index.verified(1)
    assert index.unverified(5) is None
    assert index.unverified(3) == (0, 100)


def test_without_events_there_is_nothing() -> None:
    assert index_of([], 0)[0].unverified(0) is None

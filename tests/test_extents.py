"""`ExtentMap`, `ExtentSet` and joining against a list with one entry for each byte.

The values of a map are positions that move along with the bytes, or words that do not. Ranges are
never empty here: nobody asks for nothing.
"""

from __future__ import annotations

from itertools import groupby, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.extents import Extent, ExtentMap, ExtentSet, join_neighbours
from nbdproxy.extents import runs as runs_of

SIZE = 24

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda drawn: (drawn[0], min(SIZE, drawn[0] + drawn[1]))
)
operations = st.lists(st.tuples(st.booleans(), ranges, st.integers(0, 9)), max_size=20)
"""Set (True) or remove a range; the digit is what it is set to."""


def runs(bytes_of: list[object], start: int, end: int) -> list[tuple[int, int]]:
    """The maximal runs of [start, end) where the reference holds something."""
    found = []
    for held, group in groupby(range(start, end), key=lambda at: bytes_of[at] is not None):
        places = list(group)
        if held:
            found.append((places[0], places[-1] + 1))
    return found


@given(operations, ranges)
@settings(max_examples=400, deadline=None)
def test_a_map_holds_for_each_byte_what_was_set_last(
    changes: list[tuple[bool, tuple[int, int], int]], asked: tuple[int, int]
) -> None:
    tested = ExtentMap[str]()
    reference: list[str | None] = [None] * SIZE
    for sets, (start, end), digit in changes:
        if sets:
            tested.set(start, end, str(digit))
        else:
            tested.remove(start, end)
        reference[start:end] = [str(digit) if sets else None] * (end - start)
    found: list[str | None] = [None] * SIZE
    for start, end, value in tested:
        assert start < end
        found[start:end] = [value] * (end - start)
    assert found == reference
    assert all(before[1] <= after[0] for before, after in pairwise(tested))
    assert tested.total() == sum(one is not None for one in reference)
    assert len(tested) == len(list(tested))
    segments = list(tested.segments(*asked))
    assert [at for start, end, _ in segments for at in range(start, end)] == list(range(*asked))
    assert [value for start, end, value in segments for _ in range(start, end)] == reference[
        asked[0] : asked[1]
    ]
    assert list(tested.overlapping(*asked)) == [one for one in segments if one[2] is not None]


@given(operations, ranges)
@settings(max_examples=400, deadline=None)
def test_a_value_that_is_a_position_moves_along_with_the_bytes(
    changes: list[tuple[bool, tuple[int, int], int]], asked: tuple[int, int]
) -> None:
    tested = ExtentMap[int](lambda position, count: position + count)
    reference: list[int | None] = [None] * SIZE
    for number, (sets, (start, end), _) in enumerate(changes, 1):
        position = 1000 * number
        if sets:
            tested.set(start, end, position)
        else:
            tested.remove(start, end)
        for at in range(start, end):
            reference[at] = position + at - start if sets else None
    for start, end, value in tested.overlapping(*asked):
        assert list(range(value, value + end - start)) == reference[start:end]
    covered = [at for start, end, _ in tested.overlapping(*asked) for at in range(start, end)]
    assert covered == [at for at in range(*asked) if reference[at] is not None]


def test_a_cleared_map_is_empty() -> None:
    tested = ExtentMap[int]()
    tested.set(0, 10, 1)
    tested.clear()
    assert (len(tested), tested.total(), list(tested)) == (0, 0, [])


def test_an_empty_range_changes_nothing() -> None:
    tested, extents = ExtentMap[int](), ExtentSet()
    tested.set(0, 10, 1)
    tested.set(5, 5, 2)
    tested.remove(5, 5)
    extents.add(3, 3)
    assert list(tested) == [(0, 10, 1)]
    assert list(extents) == []


@given(st.lists(ranges, max_size=12), ranges)
@settings(max_examples=400, deadline=None)
def test_a_set_holds_every_byte_that_was_added(
    added: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    tested = ExtentSet()
    reference: list[object] = [None] * SIZE
    for start, end in added:
        tested.add(start, end)
        reference[start:end] = [1] * (end - start)
    assert [(one.offset, one.end) for one in tested] == runs(reference, 0, SIZE)
    assert tested.total() == reference.count(1)
    assert len(tested) == len(runs(reference, 0, SIZE))
    assert tested.covers(*asked) == all(reference[asked[0] : asked[1]])
    overlapping = [(one.offset, one.end) for one in tested.overlapping(*asked)]
    assert overlapping == runs(reference, *asked)
    inverse: list[object] = [None if one else 1 for one in reference]
    missing = [(one.offset, one.end) for one in tested.missing(*asked)]
    assert missing == runs(inverse, *asked)


def test_extents_that_touch_are_one() -> None:
    tested = ExtentSet()
    for start, end in ((0, 5), (10, 15), (5, 10)):
        tested.add(start, end)
    assert list(tested) == [Extent(0, 15)]


def test_an_extent_ends_behind_its_last_byte() -> None:
    assert Extent(3, 4).end == 7


@given(st.lists(ranges))
@settings(max_examples=200, deadline=None)
def test_joined_neighbours_and_runs_are_what_the_set_has(drawn: list[tuple[int, int]]) -> None:
    extents = [Extent.between(*one) for one in sorted(drawn)]
    held = list(ExtentSet(extents))
    assert list(join_neighbours(extents, Extent.joined)) == held
    numbers = {number for one in extents for number in range(one.offset, one.end)}
    assert runs_of(numbers) == [(one.offset, one.end) for one in held]


def test_what_cannot_be_joined_stays_apart() -> None:
    same = join_neighbours(["a", "b", "b", "a"], lambda one, other: one if one == other else None)
    assert list(same) == ["a", "b", "a"]

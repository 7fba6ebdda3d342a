"""What is left fails, and nothing of it can be left out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.delta_debugging import ddmin

COUNTS = st.integers(1, 12)


@given(count=COUNTS, data=st.data())
def test_none_of_what_is_left_can_be_left_out(count: int, data: st.DataObject) -> None:
    """Whatever fails, monotone or not: each subset is drawn to fail or to pass."""
    failing = data.draw(st.sets(st.integers(1, 2**count - 1), max_size=64)) | {2**count - 1}
    tests = 0

    def fails(items: Sequence[int]) -> bool:
        nonlocal tests
        tests += 1
        return sum(1 << item for item in items) in failing

    left = ddmin(range(count), fails)
    assert tests <= count * count + 3 * count
    assert list(left) == sorted(left)
    assert fails(left)
    if len(left) > 1:
        assert not any(fails([*left[:at], *left[at + 1 :]]) for at in range(len(left)))


@given(needed=st.sets(st.integers(0, 99), min_size=1, max_size=5))
def test_what_all_failures_need_is_all_that_is_left(needed: set[int]) -> None:
    assert set(ddmin(range(100), needed.issubset)) == needed


def test_a_single_item_is_found_in_logarithmic_time() -> None:
    tests = []

    def fails(items: Sequence[int]) -> bool:
        tests.append(items)
        return 777 in items

    assert list(ddmin(range(1024), fails)) == [777]
    assert len(tests) <= 20


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_tested_of_one_item(count: int) -> None:
    assert len(ddmin(range(count), lambda _: pytest.fail("it was asked"))) == count

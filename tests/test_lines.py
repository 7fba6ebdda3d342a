"""A line of JSON from somebody else: what is deep is refused, however short it is."""

from __future__ import annotations

import pytest

from nbdproxy.lines import parse_object


@pytest.mark.parametrize("count", [500, 5_000])
@pytest.mark.parametrize("brackets", [b"[]", b'{"a":}'])
def test_depth_within_the_length_is_refused(count: int, brackets: bytes) -> None:
    middle = len(brackets) - 1
    deep = brackets[:middle] * (count) + b"1" + brackets[middle:] * (count)
    assert parse_object(b'{"a": ' + deep + b"}") is None
    assert parse_object(b'{"a": [[1]]}') == {"a": [[1]]}

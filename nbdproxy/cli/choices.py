"""Reads what users write as comma-separated lists, sizes and ranges."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TypeVar

from nbdproxy.errors import UsageError
from nbdproxy.sizes import parse_size

E = TypeVar("E", bound=Enum)


def parse_list(text: str | None, choices: type[E], option: str) -> list[E] | None:
    """Return the members of `choices` that "a,b" names; None stays None."""
    if text is None:
        return None
    known = {choice.value: choice for choice in choices}
    return [known[word] for word in parse_words(text, known, option)]


def parse_words(text: str, known: Iterable[str], option: str) -> list[str]:
    """Return the words of "a,b", each of which must be known."""
    known = list(known)
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise UsageError(f"{option}: {word!r} is unknown; choose from {', '.join(known)}")
    if not words:
        raise UsageError(f"{option} is empty; choose from {', '.join(known)}")
    return words


def parse_range(text: str) -> tuple[int, int]:
    """Return the bytes [a, b) that "A-B" names; both may have a unit: 4K-1M."""
    low, dash, high = text.partition("-")
    start, end = parse_size(low), parse_size(high)
    if not dash or start is None or end is None or not 0 <= start < end:
        raise UsageError(f"--range: {text!r} is not a range of bytes; write for example 4K-1M")
    return start, end

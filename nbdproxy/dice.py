"""Stateless random draws: the same seed and words give the same number, in any order, anywhere.

Nothing is remembered between draws, so what one rule draws never changes what another one gets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

_RANGE = 2**64


def draw(seed: int, *words: str | int) -> float:
    """Return a number in [0, 1)."""
    return _digest(seed, words) / _RANGE


def draw_below(limit: int, seed: int, *words: str | int) -> int:
    """Return a whole number in [0, limit); `limit` is at least 1."""
    return _digest(seed, words) * limit // _RANGE


def mix(numbers: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Return for each number another one, evenly spread; each `key` gives others.

    The finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
    generators", 2014); equal numbers always give equal ones.
    """
    z = (numbers ^ np.uint64(key % _RANGE)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key_of(seed: int, *words: str | int) -> int:
    """Return a key for `mix`, a number below 2**64."""
    return _digest(seed, words)


def _digest(seed: int, words: tuple[str | int, ...]) -> int:
    return xxh3_64_intdigest("\0".join(map(str, words)).encode(), seed % _RANGE)


class DrawKey(NamedTuple):
    """Makes the draws of a rule for one request: the seed, its name, and the request's number."""

    seed: int
    rule: str
    number: int

    def draw(self, *words: str | int) -> float:
        """Return a number in [0, 1) for this request."""
        return draw(self.seed, self.rule, self.number, *words)

    def draw_below(self, limit: int, *words: str | int) -> int:
        """Return a whole number in [0, limit) for this request."""
        return draw_below(limit, self.seed, self.rule, self.number, *words)

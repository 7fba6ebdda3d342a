"""Delta debugging: of many circumstances that make something fail, a few that are enough.

The algorithm ddmin (Zeller, Hildebrandt, "Simplifying and isolating failure-inducing input", IEEE
Transactions on Software Engineering 28(2), 2002): parts of the items are tried, then all but one
part, first of two parts, then of four and so on.

Guarantees: what is returned fails, and does not fail if any single item of it is left out
(1-minimal); at most n^2 + 3n tests for n items, and about 2 log2(n) where one item is enough. Not
covered: a smaller set that is found only by leaving out several items at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def ddmin(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """Return items that fail, in their order, and none of which can be left out.

    All of `items` together have to fail; that, and whether none of them fails, is not tested.
    `fails` has to say the same of the same items each time.
    """
    parts = 2
    while len(items) > 1:
        size = -(-len(items) // parts)
        cuts = range(0, len(items), size)
        subsets = [items[at : at + size] for at in cuts]
        # Of two parts each is what the other leaves.
        rests = [[*items[:at], *items[at + size :]] for at in cuts] if parts > 2 else []
        subset = next(filter(fails, subsets), None)
        rest = next(filter(fails, rests), None) if subset is None else None
        if subset is not None:
            items, parts = subset, 2
        elif rest is not None:
            items, parts = rest, max(parts - 1, 2)
        elif size == 1:
            break
        else:
            parts = min(parts * 2, len(items))
    return items

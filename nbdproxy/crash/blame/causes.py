"""Whose fault it is: the cause for which a file is not whole in a crash state.

Found by counterfactuals: the same file is looked at in the states that keep more and more at the
same cut, and the cause is the first thing that would have had to be kept for it to be whole. No
byte of filesystem layout is interpreted on the way.

Not covered: which bytes of the file, and whether its data or the way to it was lost: see `ranges`.
What the guest changed itself is looked for after each
earlier flush (see `replay`); a file that was whole only between two of them counts as never-sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from nbdproxy.persistence.model import Level


class Cause(Enum):
    """The first thing that would have had to be kept."""

    FLUSHED_THEN_LOST = "flushed-then-lost"
    """Durable by the rules: the store, QEMU, or the mode unsafe broke the promise."""
    FLUSH_IN_FLIGHT = "flush-in-flight"
    """The covering flush was received and not completed."""
    UNFLUSHED = "unflushed"
    """Completed, and no flush covered it."""
    SENT_UNANSWERED = "sent-unanswered"
    """Received, and not completed at the cut."""
    CHANGED_BY_GUEST = "changed-by-guest"
    """It was whole at an earlier flush, and the guest changed or removed it since: no loss."""
    MAPPING_NEVER_SENT = "mapping-never-sent"
    """Its data was sent into a qcow2 file, and the table that leads to it was still in QEMU."""
    NEVER_SENT = "never-sent"
    """No request ever carried it: it was still in the guest."""
    CANNOT_BE_TOLD = "cannot-be-told"
    """What keeps more could not be judged, or something was written that nothing leads to."""


_LAYERS = {
    Level.FLUSHED: Cause.FLUSHED_THEN_LOST,
    Level.FLUSHED_OR_FLUSHING: Cause.FLUSH_IN_FLIGHT,
    Level.COMPLETED: Cause.UNFLUSHED,
    Level.RECEIVED: Cause.SENT_UNANSWERED,
}


class WholeFiles(NamedTuple):
    """The files that are whole in a state that keeps more, and those of which it is not known."""

    whole: frozenset[str]
    doubtful: frozenset[str]


def find_causes(
    broken: frozenset[str],
    level: Level,
    promised: Level,
    kept_in: Callable[[Level], WholeFiles],
    earlier: Callable[[frozenset[str]], WholeFiles],
) -> Iterator[tuple[str, Cause]]:
    """Yield each file of `broken` with its cause.

    `level` is what the state at hand keeps; only layers above it can tell anything. `promised` is
    what the cache mode promises to keep: what is whole in that was lost against the promise.
    `kept_in` gives what became of the files when all of a layer is kept, and `earlier` what some
    of them were at earlier instants; both are asked only while files are left.
    A file that is doubtful in one layer may have been whole there, so no later one is blamed.
    """
    levels = list(Level)
    left = set(broken)
    for layer in levels[levels.index(level) + 1 :]:
        if not left:
            return
        kept = kept_in(layer)
        saved, doubtful = left & kept.whole, left & kept.doubtful
        left -= saved | doubtful
        is_promised = levels.index(layer) <= levels.index(promised)
        for path in sorted(saved):
            yield path, Cause.FLUSHED_THEN_LOST if is_promised else _LAYERS[layer]
        for path in sorted(doubtful):
            yield path, Cause.CANNOT_BE_TOLD
    before = earlier(frozenset(left)) if left else WholeFiles(frozenset(), frozenset())
    for path in sorted(left):
        if path in before.whole:
            yield path, Cause.CHANGED_BY_GUEST
        else:
            yield path, Cause.CANNOT_BE_TOLD if path in before.doubtful else Cause.NEVER_SENT

"""The cause for which a file is not whole in a crash state: who lost it, and the words for that.

Found by counterfactuals: the same file is looked at in the states that keep more and more at the
same cut, and the cause is the first thing that would have had to be kept for it to be whole. No
byte of filesystem layout is interpreted on the way.

Not covered: which bytes of the file, and whether its data or the way to it was lost: see `ranges`.
What the guest changed itself is looked for after each earlier flush (see `replay`); a file that was
whole only between two of them counts as never-sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from nbdproxy.persistence.model import Level


class Cause(Enum):
    """The first thing that would have had to be kept; `CAUSES` says what each means."""

    FLUSHED_THEN_LOST = "flushed-then-lost"
    FLUSH_IN_FLIGHT = "flush-in-flight"
    UNFLUSHED = "unflushed"
    SENT_UNANSWERED = "sent-unanswered"
    CHANGED_BY_GUEST = "changed-by-guest"
    MAPPING_NEVER_SENT = "mapping-never-sent"
    NEVER_SENT = "never-sent"
    CANNOT_BE_TOLD = "cannot-be-told"


@dataclass(frozen=True, slots=True)
class CauseText:
    """What is said of a cause, wherever it is.

    found     the first layer in which the file is whole, or, in words, what was found instead
    who       who lost the file: a line of the README's table
    sentence  of several files, with {they}, {them} and {were}; it follows "3 of 5 files"
    advice    of one file: what is behind it, and what helps
    """

    found: Level | str
    who: str
    sentence: str
    advice: str


CAUSES = {
    Cause.FLUSHED_THEN_LOST: CauseText(
        Level.FLUSHED,
        "the store, or `cache=unsafe`: it was flushed and is not there",
        "{were} lost although durable: the cache mode, or the store below, broke its promise",
        "It had been flushed. The cache mode ignores flushes (unsafe), or the store below lost "
        "what it had acknowledged: nbdproxy audit tells.",
    ),
    Cause.FLUSH_IN_FLIGHT: CauseText(
        Level.FLUSHED_OR_FLUSHING,
        "nobody: the flush was not answered yet",
        "{were} being flushed at that very moment: the flush came too late",
        "It was being flushed just then. Nobody had promised anything yet.",
    ),
    Cause.UNFLUSHED: CauseText(
        Level.COMPLETED,
        "the mode's volatile cache: written, but no flush covered it",
        "had been written and not flushed: a volatile write cache may lose {them}",
        "It was written and not flushed. An fsync would have protected it, and so would "
        "cache=writethrough or directsync, which flush every write.",
    ),
    Cause.SENT_UNANSWERED: CauseText(
        Level.RECEIVED,
        "nobody: it was on its way",
        "{were} still on the way to the disk, and nobody had promised anything",
        "It was on its way. Nobody had promised anything yet; an fsync that returns does.",
    ),
    Cause.CHANGED_BY_GUEST: CauseText(
        "none of them, but whole at an earlier flush, all sent",
        "nobody: it had been whole on the disk, and the guest changed or removed it afterwards",
        "{were} changed or removed by the guest itself: nobody lost {them}",
        "It had been whole, and the guest changed or removed it: nothing was lost.",
    ),
    Cause.MAPPING_NEVER_SENT: CauseText(
        "none of them, but whole with clusters of the qcow2 file that nothing leads to",
        "QEMU, below which was recorded: the data is in the qcow2 file, and the L2 entry that "
        "leads to it was still in QEMU's memory",
        "had been written, and the qcow2 table that leads to {them} was still in QEMU's memory "
        "(no flush had come): it dies with QEMU, and {they} read as zeroes",
        "Its data was written, and the qcow2 table that leads to it was in QEMU's memory. An fsync "
        "would have made QEMU write the table; a raw image has none.",
    ),
    Cause.NEVER_SENT: CauseText(
        "none of them",
        "the guest: no request ever carried it. No cache mode saves it; the application did not "
        "fsync",
        "{were} lost in the guest, which had not sent {them} to any disk (no fsync): no cache mode "
        "could have saved {them}",
        "No request had carried it as it should be: the guest still had it in memory, or what is "
        "expected is not of this disk. No cache mode can help. Let the application fsync the file "
        "and its directory, or sync before the power goes.",
    ),
    Cause.CANNOT_BE_TOLD: CauseText(
        "not known: one of them cannot be judged, or, below qcow2, something was written that "
        "nothing leads to",
        "a state that keeps more cannot be judged; or, below qcow2, something was written that "
        "nothing leads to, and it may be the file's",
        "{were} lost by someone who cannot be told: what would show it cannot be judged here",
        "Who lost it cannot be told: a state that keeps more cannot be judged here (--oracle "
        "kernel may), or something was written that nothing in the qcow2 file leads to.",
    ),
}
"""Everything that is said of causes: replay, explain and the tables of the documents."""

_OF_LAYER = {text.found: cause for cause, text in CAUSES.items()}


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
            yield path, Cause.FLUSHED_THEN_LOST if is_promised else _OF_LAYER[layer]
        for path in sorted(doubtful):
            yield path, Cause.CANNOT_BE_TOLD
    before = earlier(frozenset(left)) if left else WholeFiles(frozenset(), frozenset())
    for path in sorted(left):
        if path in before.whole:
            yield path, Cause.CHANGED_BY_GUEST
        else:
            yield path, Cause.CANNOT_BE_TOLD if path in before.doubtful else Cause.NEVER_SENT

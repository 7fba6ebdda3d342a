"""Several recorded disks of one guest, judged together: one table for the whole tree of files.

Each file is judged on the recording that has its filesystem. An instant is the same for all, by the
wall clocks at their starts, to a few milliseconds; `end` and `before-exit` are each one's own. What
is named by a recording's own count (`seq:N`, `flush:N`) and `riskiest` are those of the first, and
a mark is looked for in one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from nbdproxy.crash.blame.replay import (
    Cell,
    FileOutcome,
    JudgedFiles,
    Replay,
    ReplayOptions,
    StateOutcome,
    replay,
)
from nbdproxy.crash.states.cuts import Cut, resolve
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import ProjectionError, RecordingError, UsageError
from nbdproxy.oracles.check import merge
from nbdproxy.oracles.composite import split
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entries, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.persistence.modes import CacheMode, Taken

_UNKNOWN = FileOutcome(Condition.CANNOT_BE_TOLD, None)


@dataclass(frozen=True, slots=True)
class Together:
    """The table of all files, and those of each recording's own files, in order.

    The table's `recorded_under` are the modes under which all of them can have been taken. Its
    words, and the notes of its cuts, name the recording where they are not the same of all.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     together = case.replay()
    >>> len(together.each), len(together.table.cells)
    (1, 25)
    """

    table: Replay
    each: tuple[Replay, ...]


def replay_together(
    files: Sequence[JudgedFiles],
    manifest: Manifest,
    options: ReplayOptions,
    cuts: Sequence[Cut],
    names: Sequence[str],
) -> Together:
    """Judge every asked-for cell, as `replay.replay` does for one recording.

    `files` are the shares that the recordings have of the manifest, and `names` what these are
    called in the table.
    """
    each = tuple(replay(share, options, cut) for share, cut in zip(files, cuts, strict=True))
    shown = [f"disk {number} ({name})" for number, name in enumerate(names, start=1)]
    return Together(_merged(each, manifest, shown), each)


def modes_in_common(every: Sequence[Taken]) -> list[CacheMode]:
    """Return the modes that all recordings tell of; ProjectionError if there is none."""
    found = [mode for mode in CacheMode if all(mode in one.tells for one in every)]
    if not found:
        known = "; ".join(
            f"disk {number} tells of {', '.join(mode.value for mode in one.tells)} only ({one.why})"
            for number, one in enumerate(every, start=1)
            if one.why
        )
        raise ProjectionError(
            f"these recordings have no cache mode in common: {known}; judge each for itself, or "
            f"say QEMU's cache mode of then with --recorded-as, if you know it"
        )
    return found


def instants(sources: Sequence[RecordedSource], text: str) -> list[Cut]:
    """Return the cut of each recording that a text names; UsageError if none has it."""
    if text in {"end", "before-exit"}:
        return [resolve(source, text) for source in sources]
    if any(source.meta.policies == ("imported",) for source in sources):
        raise UsageError(
            f"{text!r}: an imported recording does not say when it began; for several disks "
            f"together use end or before-exit"
        )
    known, cut = _first(sources, text)
    instant = _began_ns(known) + cut.time_ns(known)
    return [
        cut
        if source is known
        else Cut(text, source.position_at(instant - _began_ns(source)), cut.note)
        for source in sources
    ]


def _first(sources: Sequence[RecordedSource], text: str) -> tuple[RecordedSource, Cut]:
    """Return the first recording that knows an instant; only marks are looked for in others."""
    others = sources[1:] if text.startswith("mark:") else ()
    try:
        return sources[0], resolve(sources[0], text)
    except UsageError:
        for source in others:
            try:
                return source, resolve(source, text)
            except UsageError:
                continue
        raise


def _began_ns(source: RecordedSource) -> int:
    try:
        return round(datetime.fromisoformat(source.meta.started).timestamp() * 1e6) * 1000
    except (ValueError, OverflowError, OSError):
        raise RecordingError(
            f"{source.path} does not say when it began; for several disks together use end or "
            "before-exit"
        ) from None


def shares(manifest: Manifest, trees: Sequence[Tree]) -> list[Manifest]:
    """Return the files of each recording; the first has those that are on none."""
    if len(trees) == 1:
        return [manifest]
    own = [
        {path for part in split(manifest, tree)[0].values() for path in part.paths()}
        for tree in trees
    ]
    own[0] |= set(manifest.paths()).difference(*own)
    return [Manifest(Entries(e for e in manifest.entries if e.path in some)) for some in own]


def _merged(each: Sequence[Replay], manifest: Manifest, names: Sequence[str]) -> Replay:
    first = each[0]
    cells = []
    for some in zip(*(one.cells for one in each), strict=True):
        cell: Cell = some[0]
        verdict = merge({one.verdict for one in some})
        worst, best = (
            _outcome([getattr(one, end) for one in some], each, manifest, names)
            for end in ("worst", "best")
        )
        cut = _cut([one.cut for one in some], names)
        cells.append(replace(cell, cut=cut, verdict=verdict, worst=worst, best=best))
    return replace(
        first,
        manifest=manifest,
        cut=_cut([one.cut for one in each], names),
        recorded_under=frozenset.intersection(*(one.recorded_under for one in each)),
        left_out=tuple(dict.fromkeys(mode for one in each for mode in one.left_out)),
        cells=tuple(cells),
        below_qcow2=any(one.below_qcow2 for one in each),
        why=_told([one.why for one in each], names),
        remark=_told([one.remark for one in each], names),
    )


def _told(words: Sequence[str], names: Sequence[str]) -> str:
    """Return what is said of the recordings: once if it is the same of all, else each by name."""
    if len(set(words)) == 1:
        return words[0]
    return "; ".join(f"{name}: {one}" for name, one in zip(names, words, strict=True) if one)


def _cut(cuts: Sequence[Cut], names: Sequence[str]) -> Cut:
    """Return the first one's cut, with what is to be said of each, by preference what matters."""
    matters = any(cut.matters for cut in cuts)
    notes = [cut.note if cut.matters is matters else "" for cut in cuts]
    return replace(cuts[0], note=_told(notes, names), matters=matters)


def _outcome(
    some: Sequence[StateOutcome], each: Sequence[Replay], manifest: Manifest, names: Sequence[str]
) -> StateOutcome:
    """Return what the disks together hold: of one that cannot be judged, no file can be told.

    Without files, as for one disk, if that is so of all of them.
    """
    files: dict[str, FileOutcome] = {}
    if any(one.files for one in some):
        for one, replay in zip(some, each, strict=True):
            files |= one.files or dict.fromkeys(replay.manifest.paths(), _UNKNOWN)
    return StateOutcome(
        some[0].state,
        merge({one.verdict for one in some}),
        _told([one.reason or "" for one in some], names) or None,
        {path: files[path] for path in manifest.paths() if path in files},
    )

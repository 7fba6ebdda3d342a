"""The table cache mode x failure: which files are whole after each, and who lost the others.

For each cell two crash states are judged, the ends of what the model allows: `worst` has only what
the failure is bound to leave, `best` has all that was sent. A cell's verdict merges both (fail
beats unknown beats pass); a state whose filesystem cannot be judged is unknown and never passes.

Guarantees: equal choices of requests are judged once, however many cells share them; the causes
come from states of the same cut that keep more (`crash/blame/causes.py`). A disk that reads all
zeroes certainly holds no file: all are missing there, which is a fail and not an unknown.

Not covered: the states between the two ends, in which files can break that both ends have whole;
that is what exploring is for.
"""

from __future__ import annotations

import functools
import hashlib
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from nbdproxy.crash.blame.causes import Cause, WholeFiles, find_causes
from nbdproxy.crash.blame.unmapped import Unmapped
from nbdproxy.crash.states.cuts import Cut, resolve
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.source import Source
from nbdproxy.crash.states.taken import taken_under
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Findings, Verdict, merge
from nbdproxy.oracles.composite import TreeCheck, split
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entries, Entry, Manifest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.oracle import EarlierDigests, Oracle
from nbdproxy.oracles.qcow2 import is_qcow2
from nbdproxy.oracles.quick import QUICK
from nbdproxy.persistence.model import DEFAULTS, Level, Options
from nbdproxy.persistence.modes import (
    CacheMode,
    Failure,
    check_projection,
    guarantee,
    promised,
)
from nbdproxy.recording.index import Mask, RequestTable


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What became of one file; `cause` is None if it is whole, or if that cannot be told.

    >>> FileOutcome(Condition.ZEROED, Cause.UNFLUSHED).is_whole
    False
    """

    condition: Condition
    cause: Cause | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is lost or in doubt."""
        return self.condition is Condition.WHOLE


@dataclass(frozen=True, slots=True)
class StateOutcome:
    """What a crash state holds; `files` is empty if that cannot be told, for `reason`.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     worst = case.replay([CacheMode.NONE], [Failure.STORAGE_LOSS]).table.cells[0].worst
    >>> dict(worst.conditions)
    {<Condition.MISSING: 'missing'>: 2}
    """

    state: StateId
    verdict: Verdict
    reason: str | None
    files: Mapping[str, FileOutcome]

    def condition_of(self, path: str) -> Condition | None:
        """Return the condition of a file; None if there is none of this path."""
        found = self.files.get(path)
        return None if found is None else found.condition

    @property
    def conditions(self) -> Counter[Condition]:
        """How many files are in each condition."""
        return Counter(outcome.condition for outcome in self.files.values())

    @property
    def causes(self) -> Counter[Cause]:
        """How many of the files that are not whole have each cause."""
        return Counter(outcome.cause for outcome in self.files.values() if outcome.cause)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cache mode, one failure, and the ends of what it may leave.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     (cell,) = case.replay([CacheMode.NONE], [Failure.HOST_POWER_LOSS]).table.cells
    >>> cell.worst.verdict.value, cell.best.verdict.value
    ('fail', 'pass')
    """

    mode: CacheMode
    failure: Failure
    cut: Cut
    verdict: Verdict
    worst: StateOutcome
    best: StateOutcome


@dataclass(frozen=True, slots=True)
class Replay:
    """The table, for the files of `manifest`, with absolute paths, in the guest's `tree`.

    `below_qcow2` tells whether the disk that was recorded is a qcow2 file. `left_out` are the modes
    that this recording tells nothing about, and `why` says why; `remark` says what was taken for
    granted of the cache mode that it was recorded under.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     table = case.replay().table
    >>> table.cut.text, len(table.manifest.entries), table.left_out
    ('before-exit', 2, ())
    """

    manifest: Manifest
    tree: Tree
    cut: Cut
    recorded_under: frozenset[CacheMode]
    left_out: tuple[CacheMode, ...]
    cells: tuple[Cell, ...]
    below_qcow2: bool = False
    why: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Which cells of the table are asked for, and how they are judged.

    modes        None: all that the recording can be projected onto
    at           the cut, as a user writes it; None is `end` for a guest's poweroff and
                 `before-exit` for every other failure
    model        the reading of the persistence model
    recorded_as  the cache mode that the recording was taken under, if the user knows
    """

    modes: Sequence[CacheMode] | None = None
    failures: Sequence[Failure] = tuple(Failure)
    at: str | None = None
    model: Options = DEFAULTS
    recorded_as: CacheMode | None = None

    def cut(self, source: Source) -> Cut:
        """Return the cut of a recording; UsageError if it has none of that name."""
        return resolve(source, self.at or "before-exit")


class JudgedFiles:
    """Files on one recorded disk, and how to judge them.

    manifest  what they should be, with absolute paths
    tree      where they are
    oracle    says what they are in a state
    progress  hears of each state that is judged next
    apart     each is told of as if it were the only one: what is known of another, such as where
              its clusters are in a qcow2 file that does not lead to them, does not count for it
    """

    def __init__(
        self,
        timeline: Timeline,
        manifest: Manifest,
        tree: Tree,
        oracle: Oracle = QUICK,
        progress: Callable[[StateId], None] = lambda _: None,
        *,
        apart: bool = False,
    ) -> None:
        self.timeline = timeline
        self.manifest = manifest
        self.tree = tree
        self.oracle = oracle
        self.progress = progress
        self.apart = apart

    @cached_property
    def earlier(self) -> EarlierDigests:
        """The SHA-256 digests that the paths had before the recording, where they had any."""
        parts = by_folder(self.manifest) if self.apart else [self.manifest]
        found: dict[str, Collection[str]] = {}
        for part in parts:
            found |= earlier_digests(self.timeline, part, self.tree, self.oracle)
        return found


def replay(files: JudgedFiles, options: ReplayOptions, cut: Cut | None = None) -> Replay:
    """Judge every asked-for cell of the table; `cut` is what the options name, if that is known.

    Raises ProjectionError for a mode that the recording tells nothing about, UsageError for a cut
    that it lacks.
    """
    timeline = files.timeline
    cut = cut or options.cut(timeline.source)
    cuts = dict.fromkeys(options.failures, cut)
    if options.at is None and Failure.GUEST_POWEROFF in cuts:
        cuts[Failure.GUEST_POWEROFF] = resolve(timeline.source, "end")
    taken = taken_under(timeline, options.recorded_as)
    modes = taken.tells if options.modes is None else options.modes
    check_projection(taken, modes)
    judge = _Judge(files, options.model)
    return Replay(
        manifest=files.manifest,
        tree=files.tree,
        cut=cut,
        recorded_under=taken.modes,
        left_out=taken.left_out,
        cells=tuple(
            _cell(judge, mode, fails, cuts[fails]) for fails in options.failures for mode in modes
        ),
        below_qcow2=is_qcow2(timeline.at(cut.position)),
        why=taken.why,
        remark=taken.remark,
    )


def level_at(table: RequestTable, t: int, mode: CacheMode, failure: Failure) -> Level:
    """Return what a failure at t leaves for certain under a cache mode."""
    return guarantee(mode, failure, exit_flush_failed=exit_flush_failed(table, t))


def exit_flush_failed(table: RequestTable, t: int) -> bool:
    """Tell whether the last request by t is a flush that was answered with an error by then."""
    last = table.rows_before(t) - 1
    return bool(
        last >= 0 and table.is_flush[last] and table.error[last] and table.completed[last] < t
    )


class _Judge:
    """Judges crash states of one recording against one manifest, each choice of requests once."""

    def __init__(self, files: JudgedFiles, options: Options) -> None:
        self.timeline = files.timeline
        self.options = options
        self._files = files
        self._follower = TreeCheck(files.oracle, files.manifest, files.earlier, files.tree)
        self._unmapped_behind: dict[tuple[int, Mount, str | None], Unmapped] = {}
        self._known: dict[bytes, Findings] = {}
        self._outcomes: dict[tuple[bytes, int, Level, Level], StateOutcome] = {}
        self._earlier: dict[tuple[int, Options, frozenset[str]], WholeFiles] = {}
        self._last: Mask | None = None

    def outcome(self, state: StateId, level: Level, promise: Level) -> StateOutcome:
        """Judge a state; `level` is what it keeps for certain, and so cannot be the cause.

        `promise` is what the mode says is durable.
        """
        key = (_key(self._choice(state)), state.position, level, promise)
        if key not in self._outcomes:
            self._outcomes[key] = self._outcome(state, level, promise)
        return replace(self._outcomes[key], state=state)

    def _outcome(self, state: StateId, level: Level, promise: Level) -> StateOutcome:
        findings = self._findings(state)
        fine = {Condition.WHOLE, Condition.CANNOT_BE_TOLD}
        broken = frozenset(p for p, found in findings.conditions.items() if found not in fine)
        causes = dict(
            find_causes(
                broken,
                level,
                promise,
                lambda layer: self._kept(state, layer),
                lambda paths: self._whole_earlier(state, paths),
            )
        )
        causes |= self._unmapped(state, causes)
        one = functools.cache(FileOutcome)  # thousands of files, and few outcomes
        files = {path: one(found, causes.get(path)) for path, found in findings.conditions.items()}
        return StateOutcome(state, findings.verdict, findings.reason, files)

    def _unmapped(self, state: StateId, causes: Mapping[str, Cause]) -> dict[str, Cause]:
        """Return the files that perhaps QEMU, and not the guest, had not sent all of."""
        found: dict[str, Cause] = {}
        if Cause.NEVER_SENT not in causes.values() or not is_qcow2(
            self.timeline.at(state.position)
        ):
            return found
        for entry in self._files.manifest.entries:
            mount = self._files.tree.of(entry.path)
            if causes.get(entry.path) is not Cause.NEVER_SENT or isinstance(mount, str):
                continue
            # What was found of one file's clusters tells of those of all later ones.
            key = state.position, mount, entry.path if self._files.apart else None
            if key not in self._unmapped_behind:
                self._unmapped_behind[key] = Unmapped(self.timeline, state.position, mount)
            found[entry.path] = self._unmapped_behind[key].cause(entry)
        return found

    def _kept(self, state: StateId, layer: Level) -> WholeFiles:
        fuller = StateId(state.position, layer, Choice.MUST, self.options)
        findings = self._findings(fuller)
        whole, doubtful = (
            frozenset(path for path, found in findings.conditions.items() if found is condition)
            for condition in (Condition.WHOLE, Condition.CANNOT_BE_TOLD)
        )
        if not findings.conditions:
            doubtful = frozenset(self._files.manifest.paths())
        return WholeFiles(whole, doubtful)

    def _whole_earlier(self, state: StateId, paths: frozenset[str]) -> WholeFiles:
        """Return those of `paths` that were whole, all sent, after some flush before the cut.

        And those that may have been, as after a flush nothing could be told of them.
        """
        asked = state.position, state.options, paths
        if asked not in self._earlier:
            self._earlier[asked] = self._looked_back(state, paths)
        return self._earlier[asked]

    def _looked_back(self, state: StateId, paths: frozenset[str]) -> WholeFiles:
        left, whole, doubtful = set(paths), set[str](), set[str]()
        for position in self.timeline.after_flushes(state.position):
            earlier = StateId(position, Level.RECEIVED, Choice.MUST, self.options)
            conditions = self._findings(earlier).conditions
            for path in left:
                found = conditions.get(path, Condition.CANNOT_BE_TOLD)
                if found is Condition.WHOLE:
                    whole.add(path)
                elif found is Condition.CANNOT_BE_TOLD:
                    doubtful.add(path)
            left -= whole
            if not left:
                break
        return WholeFiles(frozenset(whole), frozenset(doubtful - whole))

    def _choice(self, state: StateId) -> Mask:
        """Return which requests a state has."""
        durability, rows = (
            self.timeline.durability(state.options),
            slice(0, len(self.timeline.table)),
        )
        if state.choice is Choice.ALL:
            return durability.sent(rows, state.position)
        return durability.kept(rows, state.position, state.level)

    def _findings(self, state: StateId) -> Findings:
        choice = self._choice(state)
        key = _key(choice)
        if key not in self._known:
            self._files.progress(state)
            disk = self.timeline.open(state)
            self._known[key] = self._follower.check(disk, self._changed(choice))
        return self._known[key]

    def _changed(self, choice: Mask) -> list[Extent] | None:
        """Return where a choice of requests may differ from the one that was judged last."""
        last, self._last = self._last, choice
        if last is None:
            return None
        table = self.timeline.table
        return table.extents((choice != last) & (table.length > 0))


def _key(choice: Mask) -> bytes:
    return hashlib.blake2b(np.packbits(choice).data, digest_size=16).digest()


def _cell(judge: _Judge, mode: CacheMode, failure: Failure, cut: Cut) -> Cell:
    level = level_at(judge.timeline.table, cut.position, mode, failure)
    must = StateId(cut.position, level, Choice.MUST, judge.options)
    promise = promised(mode)
    worst = judge.outcome(must, level, promise)
    fullest = StateId(cut.position, level, Choice.ALL, judge.options)
    best = judge.outcome(fullest, Level.RECEIVED, promise)
    verdict = merge((worst.verdict, best.verdict))
    return Cell(mode, failure, cut, verdict, worst, best)


def by_folder(manifest: Manifest) -> list[Manifest]:
    """Return the files of a manifest, directory by directory."""
    folders: dict[str, list[Entry]] = {}
    for entry in manifest.entries:
        folders.setdefault(posixpath.dirname(entry.path), []).append(entry)
    return [Manifest(Entries(some)) for some in folders.values()]


def earlier_digests(
    timeline: Timeline, manifest: Manifest, tree: Tree, oracle: Oracle = QUICK
) -> EarlierDigests:
    """Return the SHA-256 digests that the manifest's paths had before the recording, if any."""
    found: dict[str, tuple[str, ...]] = {}
    for mount, part in split(manifest, tree)[0].items():
        wanted = set(part.paths())
        folder = posixpath.commonpath([posixpath.dirname(path) for path in wanted])
        try:
            before = oracle.scan(timeline.base(), folder, mount=mount)
        except FilesystemError:
            continue
        found |= {entry.path: (entry.digest,) for entry in before.entries if entry.path in wanted}
    return found

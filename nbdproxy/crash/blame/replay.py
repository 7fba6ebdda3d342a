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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nbdproxy.crash.blame.causes import Cause, WholeFiles, find_causes
from nbdproxy.crash.blame.unmapped import Unmapped
from nbdproxy.crash.states.cuts import Cut, resolve
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.rooted import with_root
from nbdproxy.crash.states.source import Source
from nbdproxy.crash.states.taken import taken_under
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Findings, Verdict, merge
from nbdproxy.oracles.composite import TreeCheck, split
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import ANYWHERE, Where, locate
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.oracle import EarlierDigests, ManifestCheck, Oracle
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
    """What became of one file; `cause` is None if it is whole, or if that cannot be told."""

    condition: Condition
    cause: Cause | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is lost or in doubt."""
        return self.condition is Condition.WHOLE


@dataclass(frozen=True, slots=True)
class StateOutcome:
    """What a crash state holds; `files` is empty if that cannot be told, for `reason`."""

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
    """One cache mode, one failure, and the ends of what it may leave."""

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


def replay(
    source: Source,
    manifest: Manifest,
    *,
    modes: Sequence[CacheMode] | None = None,
    failures: Sequence[Failure] = tuple(Failure),
    at: str | None = None,
    cut: Cut | None = None,
    options: Options = DEFAULTS,
    recorded_as: CacheMode | None = None,
    where: Where = ANYWHERE,
    tree: Tree | None = None,
    progress: Callable[[StateId], None] = lambda _: None,
    oracle: Oracle = QUICK,
) -> Replay:
    """Judge every asked-for cell of the table.

    `modes` None means all that the recording can be projected onto. `at` None means `end` for a
    guest's poweroff and `before-exit` for every other failure; `cut` is what it names, if that is
    known. `recorded_as` is the cache mode the recording was taken under, if the user knows. `where`
    is what is known of where the files are; by default that is looked for, unless `tree` says all.
    `progress` hears of each state about to be judged.

    Raises ProjectionError for a mode that the recording tells nothing about, UsageError for a cut
    that it lacks, ManifestError if none of the files was ever on the disk, and FilesystemError if
    even the fullest state cannot be read.
    """
    if cut is None:
        cut = resolve(source, at or "before-exit")
    cuts = dict.fromkeys(failures, cut)
    if at is None and Failure.GUEST_POWEROFF in cuts:
        cuts[Failure.GUEST_POWEROFF] = resolve(source, "end")
    timeline = Timeline(source)
    try:
        taken = taken_under(timeline, recorded_as)
        modes = taken.tells if modes is None else modes
        check_projection(taken, modes)
        if tree is None:
            tree, manifest = place(timeline, manifest, cut, where, oracle)
        earlier = earlier_digests(timeline, manifest, tree, oracle)
        follower = TreeCheck(oracle, manifest, earlier, tree)
        judge = _Judge(timeline, manifest, tree, options, follower, progress)
        cells = [_cell(judge, mode, fails, cuts[fails]) for fails in failures for mode in modes]
        below_qcow2 = is_qcow2(timeline.at(cut.position))
    finally:
        timeline.close()
    return Replay(
        manifest,
        tree,
        cut,
        recorded_under=taken.modes,
        left_out=taken.left_out,
        cells=tuple(cells),
        below_qcow2=below_qcow2,
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


@dataclass(slots=True, eq=False)
class _Judge:
    """Judges crash states of one recording against one manifest, each choice of requests once."""

    timeline: Timeline
    manifest: Manifest
    tree: Tree
    options: Options
    follower: ManifestCheck
    progress: Callable[[StateId], None]
    behind: dict[tuple[int, Mount], Unmapped] = field(default_factory=dict)
    known: dict[bytes, Findings] = field(default_factory=dict)
    outcomes: dict[tuple[bytes, int, Level, Level], StateOutcome] = field(default_factory=dict)
    earlier: dict[tuple[int, Options, frozenset[str]], WholeFiles] = field(default_factory=dict)
    _last: Mask | None = None

    def outcome(self, state: StateId, level: Level, promise: Level) -> StateOutcome:
        """Judge a state; `level` is what it keeps for certain, and so cannot be the cause.

        `promise` is what the mode says is durable.
        """
        key = (_key(self._choice(state)), state.position, level, promise)
        if key not in self.outcomes:
            self.outcomes[key] = self._outcome(state, level, promise)
        return replace(self.outcomes[key], state=state)

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
        for entry in self.manifest.entries:
            mount = self.tree.of(entry.path)
            if causes.get(entry.path) is not Cause.NEVER_SENT or isinstance(mount, str):
                continue
            key = state.position, mount
            if key not in self.behind:
                self.behind[key] = Unmapped(self.timeline, state.position, mount)
            found[entry.path] = self.behind[key].cause(entry)
        return found

    def _kept(self, state: StateId, layer: Level) -> WholeFiles:
        fuller = StateId(state.position, layer, Choice.MUST, self.options)
        findings = self._findings(fuller)
        whole, doubtful = (
            frozenset(path for path, found in findings.conditions.items() if found is condition)
            for condition in (Condition.WHOLE, Condition.CANNOT_BE_TOLD)
        )
        if not findings.conditions:
            doubtful = frozenset(self.manifest.paths())
        return WholeFiles(whole, doubtful)

    def _whole_earlier(self, state: StateId, paths: frozenset[str]) -> WholeFiles:
        """Return those of `paths` that were whole, all sent, after some flush before the cut.

        And those that may have been, as after a flush nothing could be told of them.
        """
        asked = state.position, state.options, paths
        if asked not in self.earlier:
            self.earlier[asked] = self._looked_back(state, paths)
        return self.earlier[asked]

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
        if key not in self.known:
            self.progress(state)
            disk = self.timeline.open(state)
            self.known[key] = self.follower.check(disk, self._changed(choice))
        return self.known[key]

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


def place(
    timeline: Timeline,
    manifest: Manifest,
    cut: Cut,
    where: Where = ANYWHERE,
    oracle: Oracle = QUICK,
) -> tuple[Tree, Manifest]:
    """Return the guest's tree, and the manifest with absolute paths in it.

    Below a --root that no state has, no file can be told.
    Looked for where the most is there, at the end or else at the cut. Raises ManifestError if none
    of the files was ever on the disk, FilesystemError if it cannot be read.
    """
    end = timeline.at(timeline.source.events)
    there = None if cut.position == timeline.source.events else timeline.at(cut.position)
    try:
        tree, manifest = locate(oracle, end, manifest, where, there)
    except (ManifestError, FilesystemError) as at_the_end:
        if there is None:
            raise
        try:
            tree, manifest = locate(oracle, there, manifest, where, end)
        except (ManifestError, FilesystemError):
            raise at_the_end from None
    (tree,) = with_root([tree], [timeline], manifest, where.root, oracle)
    return tree, manifest


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

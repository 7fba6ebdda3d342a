"""`Case`: recordings of one guest, the files that should be on its disks, and the questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from nbdproxy.case import auditing, checking, explaining, exploring
from nbdproxy.case.exploring import THE_FILES, Check, ExploreRequest, PlannedExploration
from nbdproxy.case.oracles import MAKERS, NamedOracle, OracleName, make_oracle
from nbdproxy.case.states import DiskState, StateChoice
from nbdproxy.checker.both import BothOracles
from nbdproxy.crash.blame.explain import FileExplanation, explain
from nbdproxy.crash.blame.file_history import FileHistory, histories
from nbdproxy.crash.blame.places import place
from nbdproxy.crash.blame.replay import JudgedFiles, ReplayOptions, earlier_digests
from nbdproxy.crash.blame.together import (
    Together,
    instants,
    modes_in_common,
    replay_together,
    shares,
)
from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, StateEvaluator
from nbdproxy.crash.explore.explore import Exploration, Tally
from nbdproxy.crash.explore.judging import JudgePlan, ManifestPlan
from nbdproxy.crash.explore.minimize import minimize
from nbdproxy.crash.explore.verdicts import Verdicts
from nbdproxy.crash.states.cuts import Cut, resolve
from nbdproxy.crash.states.naming import StateId, parse_state_id
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.taken import taken_under
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.formats import ImageFormat
from nbdproxy.errors import UsageError
from nbdproxy.oracles import manifest as manifests
from nbdproxy.oracles.locate import ANYWHERE, Where, survey_tree
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.persistence.model import DEFAULTS, Level, Options
from nbdproxy.persistence.modes import CacheMode, Failure, Taken, check_projection
from nbdproxy.report import minimized
from nbdproxy.report.audited import AuditReport
from nbdproxy.report.checked import Checked
from nbdproxy.report.explored import ExplorationReport
from nbdproxy.report.minimized import MinimumReport
from nbdproxy.server.below.stored import with_store


def silent(_: str) -> None:
    """Hear what is being done, and say nothing."""


@dataclass(frozen=True, slots=True)
class Explained:
    """Histories of all files that were asked about, and of single ones all that can be told.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     told = case.explain()
    >>> [history.levels[Level.FLUSHED].since is not None for history in told.histories]
    [True, False]
    """

    histories: tuple[FileHistory, ...]
    files: list[FileExplanation]


class Case:
    """What is asked about; each thing is found out once, and when it is first needed.

    sources      the recordings of one guest's disks; none if only states of images are checked
    files        the files that should be there: a manifest, or its path
    where        what is known of where they are
    at           the cut, as a user writes it; None is `before-exit`, of a guest's poweroff `end`
    model        the reading of the persistence model
    recorded_as  the cache mode that the recordings were taken under, if that is known
    base         where the image of the only recording is now, if it moved
    tell         hears in words what is being done; may be exchanged
    warn         hears what an answer does not cover

    A case is closed by `close`, or at the end of a `with` block, and with it what it returned that
    reads a disk. The sources stay the caller's, unless `open` opened them.

    >>> with Case.open("run1", files="files.sha256") as case:
    ...     print(case.replay([CacheMode.UNSAFE], [Failure.QEMU_KILL]).table.cells[0].verdict)
    pass
    """

    def __init__(
        self,
        sources: Sequence[RecordedSource] = (),
        *,
        files: Path | Manifest | None = None,
        where: Where = ANYWHERE,
        at: str | None = None,
        model: Options = DEFAULTS,
        recorded_as: CacheMode | None = None,
        base: Path | None = None,
        oracle: OracleName = OracleName.QUICK,
        tell: Callable[[str], None] = silent,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self.sources = tuple(sources)
        self.files = files
        if where.root is not None:  # a file has one name, from the guest's root
            where = replace(where, root=explaining.absolute(where.root))
        self.where = where
        self.at = at
        self.model = model
        self.recorded_as = recorded_as
        self.base = base
        self.oracle_name = oracle
        self.tell = tell
        self.warn = warn
        self._stack = ExitStack()
        self._placed: dict[tuple[int, ...], tuple[list[Tree], Manifest]] = {}

    @classmethod
    def open(
        cls,
        *runs: Path | str,
        files: Path | str | Manifest | None = None,
        where: Where = ANYWHERE,
        at: str | None = None,
        model: Options = DEFAULTS,
        recorded_as: CacheMode | None = None,
        base: Path | str | None = None,
        oracle: OracleName | str = OracleName.QUICK,
    ) -> Self:
        """Open recordings of one guest's disks, and return the case, which closes them.

        Raises RecordingError for what is no recording, and UsageError for `base` with several.

        >>> with Case.open("run1") as case:
        ...     case.source.size
        8388608
        """
        if base is not None and len(runs) > 1:
            raise UsageError("base is the image of one recording; name one recording, or drop it")
        image = None if base is None else Path(base)
        with ExitStack() as stack:
            case = cls(
                [stack.enter_context(RecordedSource(Path(run), image=image)) for run in runs],
                files=Path(files) if isinstance(files, str) else files,
                where=where,
                at=at,
                model=model,
                recorded_as=recorded_as,
                base=image,
                oracle=OracleName(oracle),
            )
            case._stack.push(stack.pop_all())
        return case

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what the case holds; closing twice is harmless."""
        self._stack.close()

    @property
    def source(self) -> RecordedSource:
        """The recording, of a case that has just one; UsageError of others."""
        if len(self.sources) != 1:
            raise UsageError(
                f"this is asked of one recording, and the case has {len(self.sources)}"
            )
        return self.sources[0]

    @cached_property
    def timelines(self) -> tuple[Timeline, ...]:
        """Each recording as a disk that can be opened in any state."""
        found = tuple(Timeline(source) for source in self.sources)
        for timeline in found:
            self._stack.callback(timeline.close)
        return found

    @property
    def timeline(self) -> Timeline:
        """The timeline of a case that has just one recording; UsageError of others."""
        at = self.sources.index(self.source)
        return self.timelines[at]

    @cached_property
    def _named_oracle(self) -> NamedOracle:
        named = make_oracle(self.oracle_name, self._say)
        self._stack.callback(named.oracle.close)
        return named

    @property
    def oracle(self) -> Oracle:
        """Who says what files are."""
        return self._named_oracle.oracle

    @property
    def comparison(self) -> BothOracles | None:
        """Where two oracles differed so far, if two are asked."""
        return self._named_oracle.comparison

    @cached_property
    def taken(self) -> Taken:
        """Under which cache modes the recording can have been taken, and which it tells of."""
        return taken_under(self.timeline, self.recorded_as)

    @cached_property
    def wanted(self) -> Manifest | None:
        """The manifest as it was written; ManifestError if it cannot be read."""
        if isinstance(self.files, Path):
            return manifests.load(self.files)
        return self.files

    @cached_property
    def cuts(self) -> list[Cut]:
        """The cut of each recording; UsageError if none has what was named."""
        return instants(self.sources, self.at or "before-exit")

    def placed(self, cuts: Sequence[Cut]) -> tuple[list[Tree], Manifest]:
        """Return each disk's part of the guest's tree, and the manifest with absolute paths.

        Looked for at the end, or else at these cuts. Raises UsageError without a manifest,
        ManifestError if none of the files was ever there, FilesystemError if nothing can be read.
        """
        key = tuple(cut.position for cut in cuts)
        if key not in self._placed:
            if self.wanted is None:
                raise UsageError("which files? name them with --files MANIFEST")
            self._placed[key] = place(
                self.timelines,
                self.wanted,
                cuts,
                self.where,
                self.oracle,
                names=[str(source.path) for source in self.sources],
            )
        return self._placed[key]

    def replay(
        self,
        modes: Sequence[CacheMode] | None = None,
        failures: Sequence[Failure] = tuple(Failure),
    ) -> Together:
        """Tell which files each cache mode and failure would leave whole, and who lost the others.

        >>> with Case.open("run1", files="files.sha256") as case:
        ...     (cell,) = case.replay([CacheMode.NONE], [Failure.HOST_POWER_LOSS]).table.cells
        >>> {path: str(one.cause) for path, one in cell.worst.files.items()}
        {'/flushed.bin': 'None', '/unflushed.bin': 'Cause.UNFLUSHED'}

        `modes` None means all that the recordings tell of. Raises ProjectionError if one is asked
        for that they do not, and what `placed` and `cuts` raise.
        """
        if self.where.partition is not None and len(self.sources) > 1:
            raise UsageError(
                "--partition is for one recording; say what is mounted where by --mount"
            )
        chosen = modes or modes_in_common(
            [taken_under(timeline, self.recorded_as) for timeline in self.timelines]
        )
        trees, manifest = self.placed(self.cuts)
        return replay_together(
            [
                JudgedFiles(timeline, share, tree, self.oracle, self._about_to_judge)
                for timeline, share, tree in zip(
                    self.timelines, shares(manifest, trees), trees, strict=True
                )
            ],
            manifest,
            self._replay_options(chosen, failures),
            self.cuts,
            [source.path.name for source in self.sources],
        )

    def explain(
        self,
        paths: Sequence[str] = (),
        modes: Sequence[CacheMode] | None = None,
        failures: Sequence[Failure] = (Failure.HOST_POWER_LOSS,),
    ) -> Explained:
        """Tell of single files when they were sent, answered and flushed, and who lost them.

        >>> with Case.open("run1") as case:
        ...     (told,) = case.explain(["/unflushed.bin"], [CacheMode.NONE]).files
        >>> told.history.levels[Level.COMPLETED].since is not None
        True

        Without `paths` only the histories of all files are told. Without a manifest a file should
        be what it was in the end; UsageError if it was not there, or is not listed.
        """
        if not paths and self.files is None:
            raise UsageError("which file? name one by its path in the filesystem, or a manifest")
        options = self._replay_options(modes, failures)
        cut = options.cut(self.source)
        if self.files is not None:
            (tree,), wanted = self.placed([cut])
            wanted = explaining.listed(wanted, paths) if paths else wanted
        else:
            end = self.timeline.at(self.source.events)
            tree = survey_tree(self.oracle, end, self.where)
            wanted = explaining.as_in_the_end(end, paths, tree, self.oracle)
        files = JudgedFiles(self.timeline, wanted, tree, self.oracle, self._about_to_judge)
        told = histories(files, options=self.model, progress=self._about_to_look)
        return Explained(told, explain(files, told, options) if paths else [])

    def state(self, choice: StateChoice | None = None) -> DiskState:
        """Return the disk in a state, by default with all that had been sent by the end.

        >>> with Case.open("run1") as case:
        ...     state = case.state(StateChoice(at="seq:0"))
        ...     len(state.disk.pread(0, 4096))
        4096
        """
        if choice is None or choice.is_empty:
            choice = StateChoice(at="end")
        chosen = choice.of(self.timeline)
        name = f"state {chosen} of {self.source.path}"
        return DiskState(name, self.timeline.open(chosen), self.timeline, chosen.position)

    def check(self, state: DiskState | StateChoice | None = None, *, fsck: bool = True) -> Checked:
        """Tell of a state whether it mounts, what fsck finds, and what the case's files are in it.

        >>> with Case.open("run1", files="files.sha256") as case:
        ...     case.check(fsck=False).verdict.value
        'pass'

        Raises FilesystemError or ManifestError if what `where` names is not there.
        """
        state = state if isinstance(state, DiskState) else self.state(state)
        self._name_state(state.name)
        return checking.check(state, self.wanted, self.where, self.oracle, fsck=fsck)

    def plan(self, request: ExploreRequest, check: Check = THE_FILES) -> PlannedExploration:
        """Look at the cuts, and return an exploration that is ready to be run.

        >>> with Case.open("run1", files="files.sha256") as case:
        ...     case.plan(ExploreRequest(states=20, workers=1)).plan.visits
        20

        `check` says what a state has to pass. Raises UsageError for what excludes each other,
        ProjectionError for a mode that the recording does not tell of, and what `placed` raises.
        """
        check_projection(self.taken, [request.mode])
        model = request.model(self.source)
        level = request.level(self.source)
        judge = self._judge(check, request.cut)
        builder = CrashSpaceBuilder(self.timeline, level, model)
        plan = exploring.plan_exploration(builder, request, self._say)
        setup = self._setup(judge, level, model, share=request.share)
        words = exploring.words_of_check(judge, check, self.where, self.oracle_name)
        about = exploring.about_exploration(self.source, setup, request, words)
        runner = exploring.runner_of(setup, request, self.timeline)
        self._stack.callback(runner.close)
        verdicts = Verdicts(request.db, about, resume=request.resume)
        self._stack.callback(verdicts.close)
        return PlannedExploration(
            plan,
            about,
            self.source.missing,
            Exploration(builder, plan, judge, verdicts),
            runner,
            verdicts,
        )

    def explore(
        self,
        request: ExploreRequest = ExploreRequest(),  # noqa: B008 - it cannot be changed
        check: Check = THE_FILES,
        *,
        progress: Callable[[Tally], None] = lambda _: None,
    ) -> ExplorationReport:
        """Look for states that a crash may leave and that fail a check; raises what `plan` does.

        >>> with Case.open("run1", files="files.sha256") as case:
        ...     found = case.explore(ExploreRequest(states=20, workers=1))
        >>> found.tally.verdicts[Verdict.FAIL] > 0
        True
        """
        return self.plan(request, check).run(progress)

    def minimize(self, state: StateId | str, check: Check = THE_FILES) -> MinimumReport:
        """Find the fewest writes that have to be missing for a state to fail a check.

        >>> with Case.open("run1", files="files.sha256") as case:
        ...     found = case.explore(ExploreRequest(states=20, workers=1))
        ...     least = case.minimize(found.failing()[0])
        >>> len(least.missing)
        1

        Raises UsageError if the state does not fail, and what `placed` raises.
        """
        state = parse_state_id(state) if isinstance(state, str) else state
        self.timeline.open(state)
        at = f"seq:{state.position - 1}" if state.position else "end"
        judge = self._judge(check, at)
        setup = self._setup(judge, state.level, state.options)
        evaluator = StateEvaluator(self.source, setup, self.timeline)
        self.tell("minimizing")
        try:
            found = minimize(
                evaluator,
                state,
                progress=lambda left, checks: self.tell(
                    f"minimizing: {left:,} pieces left after {checks:,} checks"
                ),
            )
        finally:
            evaluator.close()
        tree = self._place_at(at)[0] if check.command is None else None
        return minimized.tell(self.timeline, found, tree)

    def audit(self, store: str, form: ImageFormat | None = None) -> AuditReport:
        """Compare a store, a path or an NBD URI, with what was acknowledged to its client.

        >>> with Case.open("run1") as case:
        ...     case.audit("recorded.img").code
        0

        `form` is what a file is, by default what was recorded. Raises UsageError if they cannot be
        compared, ImageError if the store cannot be read.
        """
        form = auditing.auditable_format(self.source, store, form)

        def compared(done: int, total: int) -> None:
            """Say how far it is."""
            self.tell(f"comparing: {100 * done // max(total, 1)} %")

        return with_store(
            store,
            lambda disk: auditing.audit(self.source, store, disk, self.model, compared),
            form=form,
        )

    def _say(self, text: str) -> None:
        """Pass a text on to whoever hears it now."""
        self.tell(text)

    def _about_to_judge(self, state: StateId) -> None:
        self.tell(f"judging crash state {state}")
        self._name_state(str(state))

    def _about_to_look(self, state: StateId, done: int, total: int) -> None:
        self.tell(f"looking at each instant: {state.level.value}, {done:,} of {total:,}")
        self._name_state(str(state))

    def _name_state(self, name: str) -> None:
        if self.comparison is not None:
            self.comparison.state = name

    def _replay_options(
        self, modes: Sequence[CacheMode] | None, failures: Sequence[Failure]
    ) -> ReplayOptions:
        return ReplayOptions(modes, failures, self.at, self.model, self.recorded_as)

    def _judge(self, check: Check, at: str | None) -> JudgePlan:
        """Return the judge of states; UsageError unless it is just one of files and command."""
        if self.files is not None and check.command is not None:
            raise UsageError("--files and --check exclude each other; drop one of them")
        try:
            if self.files is not None:
                self.tell("looking for the files")
                tree, manifest = self._place_at(at)
                earlier = earlier_digests(self.timeline, manifest, tree, self.oracle)
                return ManifestPlan(manifest, tree, earlier, MAKERS[self.oracle_name])
            if check.command is None or not check.command.strip():
                raise UsageError("what shall be checked? name --files MANIFEST or --check COMMAND")
            return exploring.command_plan(
                self.timeline,
                check,
                at,
                self.where,
                self.oracle_name,
                asked=lambda: self.oracle,
                warn=self.warn,
            )
        finally:
            # Workers have oracles of their own, and a guest takes memory that they need.
            self.oracle.close()

    def _place_at(self, at: str | None) -> tuple[Tree, Manifest]:
        (tree,), manifest = self.placed([resolve(self.source, at or "before-exit")])
        return tree, manifest

    def _setup(
        self, judge: JudgePlan, level: Level, model: Options, *, share: bool = True
    ) -> EvaluatorSetup:
        run = self.source.path.absolute()
        return EvaluatorSetup(run, self.base, level, model, judge, share)

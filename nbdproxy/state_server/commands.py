"""The judge that runs a command on each state: exit code 0 is pass, 1 fail, all else unknown.

The command is run by a shell, with these variables:

    uri       the state as an NBD export of its own; what is written to it is forgotten afterwards
    image     the state as a raw file, and
    fs        the filesystem alone as one, without the rest of the disk, and
    part      the number of the partition that it is on, 0 if there is none: made only if the
              command names them; the files may be changed
    dir       a folder with all files of the state, made only if the command names it; what cannot
              be read, as a kernel could not read it either, is not in it. A state of which all of
              a filesystem is lost fails without the command being run: a kernel refuses to mount
              it, or it reads all zeroes
    mark      the name of the last mark before the cut, empty if there is none
    position  the cut, and
    state     the state's id: only if the command line names them

A pass or a fail is shared with states that differ only where the command did not read; that takes a
command that says the same whenever it reads the same. One that names `state` shares nothing.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbdproxy.crash.explore.judging import Judge, Judgement, ReadSet
from nbdproxy.crash.states.naming import StateId
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.scratch import scratch_folder
from nbdproxy.disks.traced import TracedDisk
from nbdproxy.disks.working import WorkingImage
from nbdproxy.errors import FilesystemError, TemporaryFolderError, UsageError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.blank import what_is_blank
from nbdproxy.oracles.browse import NotMountedError
from nbdproxy.oracles.check import Verdict, candidates, only
from nbdproxy.oracles.extract import extract
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.partitions import Slice
from nbdproxy.oracles.quick import QuickOracle
from nbdproxy.recording.notes import NoteKind
from nbdproxy.signals import told_to_end
from nbdproxy.state_server.server import StateServer

_VERDICTS = {0: Verdict.PASS, 1: Verdict.FAIL}
_REASON_MAX = 300
_TAIL = 4096


@dataclass(frozen=True, slots=True)
class CommandPlan:
    """Judge states by a shell command that may take `time_limit_s` seconds for each.

    `partition` has what `fs` and `part` are of; `tree` is what `dir` shows, and `oracle` reads it.
    """

    command: str
    time_limit_s: float
    partition: int | None = None
    tree: Tree = field(default_factory=Tree)
    oracle: Callable[[], Oracle] = QuickOracle

    def open(self, timeline: Timeline) -> Judge:
        """Return the judge, for the states of a timeline."""
        return _CommandJudge(self, timeline)

    def context(self, timeline: Timeline, state: StateId) -> str:
        """Return what the command is told besides the disk."""
        return "\0".join([last_mark(timeline, state.position), *self.told(state).values()])

    def told(self, state: StateId) -> dict[str, str]:
        """Return the variables that a command is given only if it names them."""
        known = {"position": str(state.position), "state": str(state)}
        return {name: value for name, value in known.items() if self.names(name)}

    @property
    def names_part(self) -> bool:
        """Whether the command asks for one filesystem of the disk."""
        return self.names("fs") or self.names("part")

    def names(self, variable: str) -> bool:
        """Tell whether the command uses a variable."""
        return re.search(rf"\$\{{?{variable}\b", self.command) is not None


def last_mark(timeline: Timeline, position: int) -> str:
    """Return the name of the last mark before a cut, empty if there is none."""
    marks = (n for n in reversed(timeline.source.notes) if n.kind is NoteKind.MARK)
    return next((note.text for note in marks if note.seq < position), "")


class _CommandJudge:
    """Judges states; what files it makes of them it keeps from one to the next."""

    def __init__(self, plan: CommandPlan, timeline: Timeline) -> None:
        self._plan = plan
        self._timeline = timeline
        self._stack = ExitStack()
        self._server = self._stack.enter_context(StateServer(timeline))
        self._files: dict[str, WorkingImage] = {}
        self._part: tuple[int, int] | None = None  # where on the disk `fs` was last
        self._are_current = False
        self._oracle: Oracle | None = None
        self._read = ExtentSet()  # what `dir` was made from
        self._begun = ExitStack()  # what the state at hand needs: its files and its command

    def judge(
        self, state: StateId, changed: Iterable[Extent] | None
    ) -> tuple[Judgement, ReadSet | None]:
        name = str(state)
        environment = {
            **os.environ,
            "uri": self._server.uri(name),
            **self._plan.told(state),
            "mark": last_mark(self._timeline, state.position),
        }
        with self._begun:
            try:
                made = self._made(state, changed)
            except NotMountedError as error:
                return Judgement(Verdict.FAIL, str(error)), None
            except (FilesystemError, TemporaryFolderError) as error:
                return Judgement(Verdict.UNKNOWN, str(error)), None
            except OSError as error:
                return Judgement(Verdict.UNKNOWN, _unwritable(error)), None
            self._server.exports.watch(name)
            judgement = self._run({**environment, **made})
            reads = self._server.exports.reads(name)
        for extent in self._read:
            reads.add(extent.offset, extent.end)
        if made.keys() - {"dir"}:
            # A whole copy is read, so nothing can be said about what the command looked at.
            return judgement, None
        judgement = replace(judgement, looked=bool(reads))
        # What it made of a state's name is not in what it read, and a late answer may come in time.
        tells = judgement.verdict is not Verdict.UNKNOWN and not self._plan.names("state")
        return judgement, reads if tells else None

    def _made(self, state: StateId, changed: Iterable[Extent] | None) -> dict[str, str]:
        """Make what the command names of a state, and return the variables for it.

        Raises NotMountedError if its filesystem is certainly lost.
        """
        # Whatever ends this early leaves files that are of no state.
        changed = list(changed) if changed is not None and self._are_current else None
        self._are_current, self._read = False, ExtentSet()
        disk = self._timeline.open(state)
        made: dict[str, str] = {}
        if self._plan.names("image"):
            made["image"] = self._file("image", disk, changed)
        if self._plan.names_part:
            part = self._part_of(disk)
            made["part"] = str(part.number)
            if self._plan.names("fs"):
                made["fs"] = self._file("fs", part.device, self._within(part, changed))
        if self._plan.names("dir"):
            made["dir"] = self._folder(disk)
        self._are_current = True
        return made

    def _part_of(self, disk: ReadableDevice) -> Slice:
        """Return what has the filesystem; what is in it is for the command to judge."""
        try:
            return only(candidates(disk, self._plan.partition))
        except FilesystemError:
            if (blank := what_is_blank(disk, self._plan.partition)) is not None:
                raise NotMountedError(blank) from None
            raise

    def _folder(self, disk: ReadableDevice) -> str:
        """Extract all files; raises FilesystemError where it cannot be told what they are.

        NotMountedError where all of a filesystem is lost: of an empty folder a command may think
        well.
        """
        if self._oracle is None:
            self._oracle = self._plan.oracle()
            self._stack.callback(self._oracle.close)
        with _undisturbed():
            folder = self._begun.enter_context(
                tempfile.TemporaryDirectory(
                    prefix="nbdproxy-", dir=scratch_folder(), ignore_cleanup_errors=True
                )
            )
        traced = TracedDisk(disk)
        try:
            found = extract(self._oracle, traced, self._plan.tree, ["/"], Path(folder))
        except UsageError as error:
            raise FilesystemError(str(error)) from None
        if found.refused is not None:
            raise NotMountedError(found.refused)
        if found.doubtful:
            path, why = found.doubtful[0]
            raise FilesystemError(f"{path}: {why}")
        self._read = traced.reads
        return folder

    def _file(self, name: str, disk: ReadableDevice, changed: Iterable[Extent] | None) -> str:
        if name not in self._files:
            with _undisturbed():
                self._files[name] = WorkingImage()
                self._stack.callback(self._files[name].close)
        self._files[name].bring(disk, changed)
        with _undisturbed():
            return str(self._begun.enter_context(self._files[name].lent()))

    def _within(self, part: Slice, changed: Iterable[Extent] | None) -> list[Extent] | None:
        """Return the same in bytes of a part of the disk; None if that cannot be told."""
        where = (part.offset, part.length) if part.is_direct else None
        before, self._part = self._part, where
        if changed is None or where is None or where != before:
            return None
        start, end = part.offset, part.offset + part.length
        cut = ((max(one.offset, start), min(one.end, end)) for one in changed)
        return [Extent(low - start, high - low) for low, high in cut if low < high]

    def _run(self, environment: dict[str, str]) -> Judgement:
        with tempfile.TemporaryFile() as output:
            with self._begun:
                with _undisturbed():
                    process = subprocess.Popen(
                        ["/bin/sh", "-c", self._plan.command],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                    # Its children as well: they would go on reading a state that is gone.
                    self._begun.callback(_kill, process)
                try:
                    code = process.wait(self._plan.time_limit_s)
                except subprocess.TimeoutExpired:
                    limit = f"it took longer than {self._plan.time_limit_s:g} s"
                    return Judgement(Verdict.UNKNOWN, limit)
            return _judgement(code, _last_line(output.fileno()))

    def beside(self) -> Judge:
        """Return itself: files are large, and one set of them has to do."""
        return self

    def close(self) -> None:
        self._begun.close()
        self._stack.close()


def _unwritable(error: OSError) -> str:
    where = f"make room in {scratch_folder()}, or name another folder with TMPDIR"
    return f"the state could not be written to a file: {error.strerror}; {where}"


def _judgement(code: int, said: str) -> Judgement:
    verdict = _VERDICTS.get(code, Verdict.UNKNOWN)
    if verdict is not Verdict.UNKNOWN:
        return Judgement(verdict, said or None)
    ended = f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
    return Judgement(verdict, f"{ended}: {said}" if said else ended)


def _signal_name(number: int) -> str:
    """Return a signal's name; those for real-time use have none."""
    known = {one.value: one.name for one in signal.Signals}
    return known.get(number, f"signal {number}")


def _last_line(fd: int) -> str:
    size = os.fstat(fd).st_size
    text = os.pread(fd, _TAIL, max(0, size - _TAIL)).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_REASON_MAX] if lines else ""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let signals wait until the block is done, so that nothing is begun and then forgotten."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread only
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, *told_to_end())
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

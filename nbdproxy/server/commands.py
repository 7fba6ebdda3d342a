"""The judge that runs a command on each state: exit code 0 is pass, 1 fail, all else unknown.

The command is run by a shell, with these variables:

    uri       the state as an NBD export of its own; what is written to it is forgotten afterwards
    image     the state as a raw file, made only if the command names it; it may be changed
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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nbdproxy.crash.judging import Judge, Judgement, ReadSet
from nbdproxy.crash.naming import StateId
from nbdproxy.crash.timeline import Timeline
from nbdproxy.disks.copying import write_sparse
from nbdproxy.disks.scratch import scratch_folder
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Verdict
from nbdproxy.recording.notes import NoteKind
from nbdproxy.server.states import StateServer

_VERDICTS = {0: Verdict.PASS, 1: Verdict.FAIL}
_REASON_MAX = 300
_TAIL = 4096


@dataclass(frozen=True, slots=True)
class CommandPlan:
    """Judge states by a shell command that may take `time_limit_s` seconds for each."""

    command: str
    time_limit_s: float

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

    def names(self, variable: str) -> bool:
        """Tell whether the command uses a variable."""
        return re.search(rf"\$\{{?{variable}\b", self.command) is not None


def last_mark(timeline: Timeline, position: int) -> str:
    """Return the name of the last mark before a cut, empty if there is none."""
    marks = (n for n in reversed(timeline.source.notes) if n.kind is NoteKind.MARK)
    return next((note.text for note in marks if note.seq < position), "")


class _CommandJudge:
    def __init__(self, plan: CommandPlan, timeline: Timeline) -> None:
        self._plan = plan
        self._timeline = timeline
        self._stack = ExitStack()
        self._server = self._stack.enter_context(StateServer(timeline))
        self._wants_image = plan.names("image")
        self._begun = ExitStack()  # what the state at hand needs: its image and its command

    def judge(
        self,
        state: StateId,
        changed: Iterable[Extent] | None,  # noqa: ARG002
    ) -> tuple[Judgement, ReadSet | None]:
        name = str(state)
        environment = {
            **os.environ,
            "uri": self._server.uri(name),
            **self._plan.told(state),
            "mark": last_mark(self._timeline, state.position),
        }
        if self._wants_image:
            # A whole copy is read, so nothing can be said about what the command looked at.
            return self._run_on_image(state, environment), None
        self._server.shelf.watch(name)
        judgement = self._run(environment)
        reads = self._server.shelf.reads(name)
        judgement = replace(judgement, looked=bool(reads))
        # What it made of a state's name is not in what it read, and a late answer may come in time.
        tells = judgement.verdict is not Verdict.UNKNOWN and not self._plan.names("state")
        return judgement, reads if tells else None

    def _run_on_image(self, state: StateId, environment: dict[str, str]) -> Judgement:
        with self._begun:
            try:
                with _undisturbed():
                    folder = self._begun.enter_context(
                        tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=scratch_folder())
                    )
                image = Path(folder) / "image"
                write_sparse(self._timeline.open(state), image)
            except OSError as error:
                reason = f"the image could not be written: {error.strerror}"
                return Judgement(Verdict.UNKNOWN, reason)
            return self._run({**environment, "image": str(image)})

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
        """Return itself: it keeps nothing between two states."""
        return self

    def close(self) -> None:
        self._begun.close()
        self._stack.close()


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
        for number in (signal.SIGINT, signal.SIGTERM)
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

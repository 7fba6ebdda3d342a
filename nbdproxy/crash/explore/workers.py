"""Runs units of states: in this process, or in a pool of processes that may die.

A `Runner` takes units and yields what was judged, in any order. Whatever happens to a worker, each
state of each unit comes back exactly once: a unit whose worker died is run again, state by state,
and a state that kills its worker twice is unknown.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from typing import Protocol

from nbdproxy import signals
from nbdproxy.crash.explore.evaluator import (
    EvaluatorSetup,
    Judged,
    StateEvaluator,
    Unit,
    open_evaluator,
)
from nbdproxy.crash.explore.judging import Judgement
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import UsageError
from nbdproxy.oracles.check import Verdict
from nbdproxy.signals import held_back, told_to_end

DEATHS_MAX = 2
"""So many workers may die of a unit before it is taken apart, or its one state given up."""

_GLANCE_S = 1.0
"""So often it is looked whether all is to end."""
_GRACE_S = 2.0
"""So long a worker that is told to end may take for it."""
_IDLE_S = 0.5
"""So long it waits for the parent's word, if it is at no state."""
_PR_SET_PDEATHSIG = 1

_AHEAD = 3
"""Units that wait for each worker, so that none is ever idle."""


class Runner(Protocol):
    """Judges units somewhere."""

    def run(self, units: Iterable[Unit]) -> Iterator[list[Judged]]:
        """Yield what became of the states of each unit; `units` is read as there is room."""
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


class LocalRunner:
    """Judges in this process, one unit after the other; on a timeline that is open, if any is."""

    def __init__(self, job: EvaluatorSetup, timeline: Timeline | None = None) -> None:
        self._evaluator = (
            open_evaluator(job)
            if timeline is None
            else StateEvaluator(timeline.source, job, timeline)
        )

    def run(self, units: Iterable[Unit]) -> Iterator[list[Judged]]:
        """Yield what became of the states of each unit."""
        for unit in units:
            yield self._evaluator.judge(unit)

    def close(self) -> None:
        """Close the recording."""
        self._evaluator.close()


class Retry:
    """Decides what becomes of units whose worker died."""

    def __init__(self) -> None:
        self._deaths: Counter[Unit] = Counter()

    def again(self, unit: Unit) -> tuple[list[Unit], list[Judged]]:
        """Return what to run in place of a unit, and what is to be said without running it."""
        self._deaths[unit] += 1
        if self._deaths[unit] < DEATHS_MAX:
            return [unit], []
        if len(unit.states) > 1:
            return [Unit(unit.position, (state,)) for state in unit.states], []
        reason = f"{DEATHS_MAX} workers died of this state; look at it with: nbdproxy open"
        return [], [Judged(unit.states[0], Judgement(Verdict.UNKNOWN, reason), None, 0.0)]


class PoolRunner:
    """Judges in `workers` processes of this machine."""

    def __init__(self, job: EvaluatorSetup, workers: int) -> None:
        self._job = job
        self._workers = workers
        self._pool = self._open()

    def _open(self) -> ProcessPoolExecutor:
        # Its first start unblocks SIGINT here, in the midst of the first worker's (`_submit`).
        resource_tracker.ensure_running()
        # Not forked: this process may have threads, and a fork copies their locks as they are.
        try:
            return ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), _begin, (self._job,)
            )
        except OSError as error:  # of its semaphores
            raise UsageError(
                f"no workers can be started: {error.strerror}; make room in /dev/shm, which has to "
                "be there, or use --workers 1"
            ) from None

    def _submit(self, unit: Unit) -> Future[list[Judged]]:
        """Queue a unit, which may start a worker: no Ctrl-C ends that halfway."""
        with held_back():
            return self._pool.submit(_judge, unit)

    def run(self, units: Iterable[Unit]) -> Iterator[list[Judged]]:
        """Yield what became of the states of each unit, as they are done."""
        retry, suspects = Retry(), deque[Unit]()
        waiting = iter(units)
        flying: dict[Future[list[Judged]], Unit] = {}
        while True:
            # A suspect runs alone, so that no other is blamed for what it does.
            if suspects and not flying:
                unit = suspects.popleft()
                flying[self._submit(unit)] = unit
            elif not suspects:
                room = self._workers * _AHEAD - len(flying)
                for unit in itertools.islice(waiting, max(room, 0)):
                    flying[self._submit(unit)] = unit
            if not flying:
                return
            done = set[Future[list[Judged]]]()
            while not done:
                signals.check()
                done, _ = wait(flying, _GLANCE_S, return_when=FIRST_COMPLETED)
            lost: list[Unit] = []
            for future in done:
                unit = flying.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(unit)
            if lost:
                # A dead worker takes the whole pool with it; who of them did it is not told.
                lost += flying.values()
                flying.clear()
                self.close()
                self._pool = self._open()
                for unit in lost:
                    todo, said = retry.again(unit)
                    suspects += todo
                    if said:
                        yield said

    def close(self) -> None:
        """End the workers; what they are at is given up."""
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


_evaluator: StateEvaluator | None = None
_judging = False
_ended = False


def _begin(job: EvaluatorSetup) -> None:
    global _evaluator  # noqa: PLW0603 - a worker process has one job
    # Ctrl-C is for the parent, which ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGALRM, _end_now)
    for number in told_to_end():
        signal.signal(number, _end)
    _end_with_parent()
    evaluator = open_evaluator(job)
    Finalize(None, _close, exitpriority=10)
    _evaluator = evaluator
    if _ended:
        _end_now()


def _end(number: int, frame: object) -> None:  # noqa: ARG001 - the form of a signal handler
    """End the command that runs, then this process.

    Only the first signal counts: another, as when each thread of the parent dies, would raise in
    the midst of ending the command. And what is raised may be lost: numpy drops it in a comparison.
    What is being opened is opened first: what is begun by halves cannot be closed. Between two
    units nothing is raised: a message between the processes would be read or written by halves, and
    another worker would take its rest for one of its own. The parent says there is no more to do;
    if it does not, it is dead.
    """
    global _ended  # noqa: PLW0603 - there is one process to end
    if _ended:
        return
    _ended = True
    _end_after(_GRACE_S if _judging or _evaluator is None else _IDLE_S)
    if _judging:
        raise SystemExit(128 + number)


def _end_after(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_now(*_: object) -> None:
    _close()
    os._exit(128 + signal.SIGTERM)


def _close() -> None:
    if _ended:
        _end_after(_GRACE_S)
    if _evaluator is not None:
        _evaluator.close()


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, however it does (prctl(2))."""
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent is not None and os.getppid() != parent.pid:
        _end_now()


def _judge(unit: Unit) -> list[Judged]:
    global _judging  # noqa: PLW0603 - there is one unit at a time
    assert _evaluator is not None
    try:
        _judging = True
        if _ended:  # the pool goes on as if nothing had happened
            raise SystemExit(128 + signal.SIGTERM)
        return _evaluator.judge(unit)
    finally:
        _judging = False
        if _ended:
            _end_after(_IDLE_S)


def make_runner(
    job: EvaluatorSetup, workers: int | None, timeline: Timeline | None = None
) -> Runner:
    """Return a runner of this machine; None is a worker for each CPU that we may use.

    Who judges in this process does so on `timeline`, if it is given.
    """
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    return LocalRunner(job, timeline) if count <= 1 else PoolRunner(job, count)

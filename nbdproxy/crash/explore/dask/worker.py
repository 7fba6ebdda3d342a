"""What runs on the workers of a Dask cluster: opens a recording there, and judges units.

A worker process keeps a `StateEvaluator` for each `WorkOrder` that it was given, the latest few;
they are used by one thread at a time, whatever number of threads the worker has. It opens the
recording where the client sees it, if the one there is the same, and else puts it together from
pieces, in a folder beside the workers' own that all workers of the machine share.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from distributed import get_worker

from nbdproxy import __version__
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, Judged, StateEvaluator, Unit
from nbdproxy.crash.explore.pieces import IMAGE, PieceStore, Snapshot
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import NbdproxyError, UsageError
from nbdproxy.recording.meta import Fingerprint
from nbdproxy.recording.reader import Event

_PROCESS = uuid.uuid4().hex

EVALUATORS_MAX = 4
"""Explorations that take turns on a worker without opening their recordings anew each time."""


@dataclass(frozen=True, slots=True)
class RecordingIdentity:
    """Tells a recording from others at the price of opening it: its size, and two of its events.

    The first has the digest of all that the recording says of itself, the last a time in
    nanoseconds. `image` is that of an image which the user named; others know themselves whether
    they were changed.
    """

    size: int
    events: int
    first: Event
    last: Event
    image: Fingerprint | None


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """What a worker has to have at hand. `key` names it; the same key is the same order.

    With `shared` the recording may be where the client sees it. Without a `snapshot` that is the
    only place where it can be.
    """

    key: str
    version: str
    job: EvaluatorSetup
    identity: RecordingIdentity
    shared: bool
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """Whether a worker is ready; if not, it needs a snapshot, or the pieces that it is `lacking`.

    `process` is a name that no other process has.
    """

    is_ready: bool
    lacking: tuple[str, ...] = ()
    process: str = _PROCESS


@dataclass(frozen=True, slots=True)
class Task:
    """A unit, and the key of the order it belongs to.

    It is no tuple, because Dask looks for its own keys in those.
    """

    key: str
    unit: Unit


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a unit in a process; None if no evaluator for it is there (any more)."""

    process: str
    judged: list[Judged] | None


_lock = threading.Lock()
_evaluators: dict[str, tuple[RecordedSource, StateEvaluator]] = {}
"""Those of this process, the latest last, by the keys of their orders."""


def identity_of(source: RecordedSource, base: Path | None) -> RecordingIdentity:
    """Return a recording's identity; `base` is the image that the user named.

    Raises OSError if that is not there.
    """
    first, last = (next(source.log(seq, seq + 1)) for seq in (0, source.events - 1))
    image = Fingerprint.of(base) if base is not None and source.needs_image else None
    return RecordingIdentity(source.size, source.events, first, last, image)


def enlist(order: WorkOrder) -> WorkerReady:
    """Open the recording if it is here, or say what is lacking.

    Raises UsageError if another nbdproxy is installed here, and what opening an evaluator raises.
    """
    if order.version != __version__:
        raise UsageError(
            f"nbdproxy is {__version__} there and {order.version} here; install the same on all"
        )
    with _lock:
        if order.key in _evaluators:
            return WorkerReady(True)
        source = _shared(order) if order.shared else None
        job = order.job
        if source is None:
            if order.snapshot is None:
                return WorkerReady(False)
            store = _store()
            lacking = store.lacking(order.snapshot)
            run = store.run(order.snapshot) if not lacking else None
            if run is None:
                return WorkerReady(False, lacking or store.lacking(order.snapshot))
            base = run / IMAGE if order.snapshot.has_image else None
            job = replace(job, run=run, base=base)
            source = RecordedSource(run, image=base)
        try:
            evaluator = StateEvaluator(source, job)
        except BaseException:
            source.close()
            raise
        while len(_evaluators) >= EVALUATORS_MAX:
            _close(next(iter(_evaluators)))
        _evaluators[order.key] = source, evaluator
        return WorkerReady(True)


def accept(digest: str, data: bytes) -> None:
    """Keep a piece; raises RecordingError if it is damaged, OSError if there is no room."""
    _store().put(digest, data)


def judge(task: Task) -> Result:
    """Judge a unit."""
    with _lock:
        found = _evaluators.get(task.key)
        return Result(_PROCESS, found[1].judge(task.unit) if found is not None else None)


def dismiss(key: str) -> None:
    """Forget an order."""
    with _lock:
        if key in _evaluators:
            _close(key)


def _close(key: str) -> None:
    source, evaluator = _evaluators.pop(key)
    evaluator.close()
    source.close()


def _shared(order: WorkOrder) -> RecordedSource | None:
    """Return the recording at the client's own path, if it is there and is the same."""
    job = order.job
    with suppress(NbdproxyError, OSError):
        source = RecordedSource(job.run, image=job.base)
        try:
            if identity_of(source, job.base) == order.identity:
                source.base().close()
                return source
        except BaseException:
            source.close()
            raise
        source.close()
    return None


def _store() -> PieceStore:
    own = Path(get_worker().local_directory)
    return PieceStore(own.parent / "nbdproxy", own)

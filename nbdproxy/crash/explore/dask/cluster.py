"""`DaskCluster`: which workers a Dask cluster has, which can be used, and what each was given.

A worker that is new is enlisted before it gets a unit: it opens the recording, after it was handed
the pieces of it that it needs. Those go to one worker of a machine at a time, since all workers of
a machine keep them in the same place. Tasks are bound to their worker: when it goes they are ours
again, and not the scheduler's to move.

Not thread-safe.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from distributed import CancelledError, Client, Future, KilledWorker

from nbdproxy.crash.explore.dask import worker as dask_worker
from nbdproxy.crash.explore.dask.worker import Result, Task, WorkerReady, WorkOrder
from nbdproxy.crash.explore.evaluator import Unit
from nbdproxy.crash.explore.pieces import PieceSource
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import NbdproxyError
from nbdproxy.printable import visible

_LOOK_S = 0.5
"""How often the scheduler is asked who is there: often enough for a worker that dies."""

_FETCH_S = 5.0
"""What fetching a result may take before it is asked whether its worker is still there."""

_PARTING_S = 2.0
_TELL_S = 5.0
_HANDED_MAX = 3
"""How often a worker is handed pieces; if some are lacking even then, its disk is to blame."""

_Errand = Generator[tuple[Callable[..., object], tuple[object, ...]], WorkerReady, None]


@dataclass(slots=True, eq=False)
class WorkerState:
    """A worker; `flying` is what it was given, oldest first, by the keys of the futures.

    `process` tells its process from a later one at the same address. `unfit` is why it is no use.
    """

    address: str
    threads: int
    is_ready: bool = False
    process: str = ""
    has_suspect: bool = False
    flying: dict[str, tuple[Future[Result], Unit]] = field(default_factory=dict)
    errand: _Errand | None = None
    asked: Future[WorkerReady] | None = None
    handed: int = 0
    unfit: str | None = None

    @property
    def host(self) -> str:
        """The machine that it runs on."""
        return urlsplit(self.address).hostname or self.address


def say(text: str) -> None:
    """Tell the user on stderr, so that what a worker said cannot steer a terminal."""
    sys.stderr.write(f"nbdproxy: {visible(text)}\n")


class DaskCluster:
    """The workers of a cluster, for one order; owns `client`, and not `source`."""

    def __init__(
        self,
        client: Client,
        order: WorkOrder,
        source: RecordedSource,
        *,
        patience_s: float,
        tell: Callable[[str], None],
    ) -> None:
        self._client = client
        self._order = order
        self._source = source
        self._patience_s = patience_s
        self._tell = tell
        self._pieces: PieceSource | None = None
        self._members: dict[str, WorkerState] = {}
        self._done: SimpleQueue[tuple[WorkerState, Future[Any]]] = SimpleQueue()
        self._looked = 0.0
        self._useful = time.monotonic()
        self._has_told = False

    @property
    def workers(self) -> Collection[WorkerState]:
        """All that are there."""
        return self._members.values()

    @property
    def is_busy(self) -> bool:
        """Whether anything was given out and did not come back."""
        return any(worker.flying for worker in self.workers)

    def look(self) -> list[WorkerState]:
        """Return who is gone, enlist who is new, and do so only now and then.

        Raises NbdproxyError if there is no use in going on; see `DaskRunner`.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return []
        self._looked = now
        if self._client.status == "closed":
            raise self._end("the connection to the scheduler is lost; start it again")
        try:
            threads: dict[str, int] = self._client.nthreads()
        except (OSError, CancelledError):
            raise self._end("the scheduler does not answer any more; start it again") from None
        gone = [worker for worker in self.workers if worker.address not in threads]
        for worker in gone:
            del self._members[worker.address]
        for address, count in threads.items():
            self._members.setdefault(address, WorkerState(address, count))
        self._enlist()
        self._be_patient(now)
        return gone

    def _be_patient(self, now: float) -> None:
        workers = self.workers
        if any(worker.is_ready for worker in workers):
            self._useful = now
            return
        if workers and all(worker.unfit for worker in workers):
            reason = next(iter(workers)).unfit
            raise self._end(f"no worker can be used ({reason}); see that nbdproxy is there")
        if any(worker.errand is not None for worker in workers):
            # It may be long, with a large recording; but somebody is at it.
            self._useful = now
        waited = now - self._useful
        if waited > self._patience_s:
            raise self._end(
                f"there was no worker for {self._patience_s:g} s; "
                "start some with: dask worker ADDRESS --nthreads 1"
            )
        if waited > _TELL_S and not self._has_told:
            self._has_told = True
            self._tell("waiting for workers; start some with: dask worker ADDRESS --nthreads 1")

    def _end(self, what: str) -> NbdproxyError:
        return NbdproxyError(f"{what}, and go on with --db FILE --resume if you had named a --db")

    def give(self, worker: WorkerState, unit: Unit) -> None:
        """Give a unit to a worker that is ready."""
        future = self._submit(worker, dask_worker.judge, Task(self._order.key, unit))
        worker.flying[str(future.key)] = future, unit

    def enlist_again(self, worker: WorkerState) -> None:
        """Take note that a worker has not the recording open any more."""
        worker.is_ready = False
        self._enlist()

    def finished(self) -> Iterator[tuple[WorkerState, str, Result | None]]:
        """Wait a little, and yield units' keys with what came back, None if it has to be redone.

        Raises what the judge raised.
        """
        with suppress(Empty):
            worker, future = self._done.get(timeout=_LOOK_S)
            while True:
                if future is worker.asked:
                    self._go_on(worker, future)
                elif (key := str(future.key)) in worker.flying:
                    for result in self._fetch(worker, future):
                        yield worker, key, result
                worker, future = self._done.get_nowait()

    def _fetch(self, worker: WorkerState, future: Future[Result]) -> list[Result | None]:
        """Return what came back; nothing yet, if its worker seems to have gone with it."""
        try:
            return [future.result(timeout=_FETCH_S)]
        except TimeoutError:
            if future.status == "error":
                raise
            future.add_done_callback(lambda done: self._done.put((worker, done)))
            return []
        except KilledWorker:
            return [Result("", None)]
        except CancelledError:
            return [None]

    def _enlist(self) -> None:
        """Begin to get those ready who are not."""
        for worker in self.workers:
            if worker.is_ready or worker.unfit is not None or worker.errand is not None:
                continue
            if self._order.snapshot is not None and any(
                other.errand is not None and other.host == worker.host for other in self.workers
            ):
                continue
            worker.errand = self._errand(worker)
            self._ask(worker, next(worker.errand))

    def _errand(self, worker: WorkerState) -> _Errand:
        """Yield what to ask of a worker, once; it is repeated until the worker is ready."""
        order = self._order
        answer = yield dask_worker.enlist, (order,)
        if answer.is_ready:
            worker.is_ready, worker.process = True, answer.process
        elif order.snapshot is None:
            if self._pieces is None:
                self._tell("there are workers that do not see the recording; they are handed it")
                self._pieces = PieceSource(self._source)
                self._order = replace(order, snapshot=self._pieces.snapshot)
        elif worker.handed == _HANDED_MAX:
            self._refuse(worker, "what it is handed does not stay whole on its disk")
        else:
            assert self._pieces is not None
            worker.handed += 1
            for digest in answer.lacking:
                yield dask_worker.accept, (digest, self._pieces.read(digest))

    def _go_on(self, worker: WorkerState, future: Future[WorkerReady]) -> None:
        """Go on with a worker's errand."""
        assert worker.errand is not None
        try:
            self._ask(worker, worker.errand.send(future.result(timeout=_FETCH_S)))
            return
        except StopIteration:
            pass
        except TimeoutError as error:
            if future.status != "error":
                future.add_done_callback(lambda done: self._done.put((worker, done)))
                return
            self._refuse(worker, str(error))
        except (CancelledError, KilledWorker):
            pass
        except Exception as error:
            if future.status != "error":
                raise
            self._refuse(worker, str(error) or repr(error))
        worker.errand = worker.asked = None
        self._enlist()

    def _refuse(self, worker: WorkerState, why: str) -> None:
        worker.unfit = why
        self._tell(f"the worker {worker.address} cannot be used: {why}")

    def _ask(
        self, worker: WorkerState, call: tuple[Callable[..., object], tuple[object, ...]]
    ) -> None:
        worker.asked = self._submit(worker, call[0], *call[1])

    def _submit(
        self, worker: WorkerState, function: Callable[..., object], *arguments: object
    ) -> Future[Any]:
        future: Future[Any] = self._client.submit(
            function,
            *arguments,
            workers=[worker.address],
            allow_other_workers=False,
            pure=False,
        )
        future.add_done_callback(lambda done: self._done.put((worker, done)))
        return future

    def close(self) -> None:
        """Have the workers close the recording, if they are quick, and leave."""
        key, ready = self._order.key, [worker for worker in self.workers if worker.is_ready]
        with suppress(OSError, TimeoutError, CancelledError):
            for worker in self.workers:
                self._client.cancel([future for future, _ in worker.flying.values()])
                worker.flying.clear()
            parting = [self._submit(worker, dask_worker.dismiss, key) for worker in ready]
            self._wait_for({str(future.key) for future in parting})
        try:
            self._client.close(timeout=_PARTING_S)
        except OSError:
            # Else it closes itself when it is collected, be it while Dask holds its own lock.
            self._client.status = "closed"
        if self._pieces is not None:
            self._pieces.close()

    def _wait_for(self, keys: set[str]) -> None:
        until = time.monotonic() + _PARTING_S
        with suppress(Empty):
            while keys:
                _, future = self._done.get(timeout=max(until - time.monotonic(), 0.001))
                keys.discard(str(future.key))

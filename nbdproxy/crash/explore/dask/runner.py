"""`DaskRunner`: judges units on a Dask cluster. Importing it without Dask raises UsageError.

Each unit is given to one worker, and only to one that has the recording open. So it is known what
is lost with a worker that goes: others do it again, and each state comes back exactly once. Only
what a worker was at when it died is suspected of having killed it; suspects are then run alone, and
what kills workers again is taken apart, or given up as unknown. Workers may come and go.

Not covered: a scheduler that ends. That is an error; the database of verdicts keeps what was done.
"""

from __future__ import annotations

import asyncio
import pickle
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from xxhash import xxh3_128_hexdigest

from nbdproxy import __version__
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, Judged, Unit
from nbdproxy.crash.explore.workers import Retry
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import UsageError

try:
    from distributed import Client, Security
    from distributed.comm.core import connect

    from nbdproxy.crash.explore.dask import worker as dask_worker
    from nbdproxy.crash.explore.dask.cluster import DaskCluster, WorkerState, say
except ImportError as missing:
    raise UsageError(
        f"--dask needs a package that is not installed ({missing.name}); "
        "get it with: pip install 'nbdproxy[dask]'"
    ) from None

_AHEAD = 3
"""Units that wait for each worker, so that it is never idle while a result is on its way."""

_CONNECT_S = 5.0


class DaskRunner:
    """Judges on the workers of the Dask cluster whose scheduler is at `address`.

    Workers that do not see the same recording where this process does are handed it in pieces; with
    `shared` false all are. `tell` gets what the user should know meanwhile, line by line. `run`
    raises NbdproxyError if the scheduler is gone, or if for `patience_s` there is no worker that
    could be used.

    Raises UsageError if there is no scheduler, and what opening a recording raises.
    """

    def __init__(
        self,
        job: EvaluatorSetup,
        address: str,
        *,
        shared: bool = True,
        patience_s: float = 60.0,
        tell: Callable[[str], None] = say,
    ) -> None:
        self._source = RecordedSource(job.run, image=job.base)
        try:
            # The image has to be right here before workers are asked whether they have the same.
            self._source.base().close()
            base = job.base.absolute() if job.base is not None else None
            job = replace(job, run=job.run.absolute(), base=base)
            identity = dask_worker.identity_of(self._source, base)
            key = xxh3_128_hexdigest(pickle.dumps((job, identity, shared)))
            order = dask_worker.WorkOrder(key, __version__, job, identity, shared)
            client = _connect(address)
        except BaseException:
            self._source.close()
            raise
        self._cluster = DaskCluster(client, order, self._source, patience_s=patience_s, tell=tell)

    def run(self, units: Iterable[Unit]) -> Iterator[list[Judged]]:
        """Yield what became of the states of each unit, as they are done."""
        stock = _Stock(units)
        while self._cluster.is_busy or not stock.is_empty():
            for worker in self._cluster.look():
                yield from stock.take_back(worker)
            _deal(stock, self._cluster)
            for worker, key, result in self._cluster.finished():
                if result is not None and result.process != worker.process:
                    # Another process at the same address: the one that had this unit died.
                    yield from stock.take_back(worker)
                    self._cluster.enlist_again(worker)
                    continue
                unit = worker.flying.pop(key)[1]
                if result is None or result.judged is None:
                    stock.again.append(unit)
                    if result is not None:
                        self._cluster.enlist_again(worker)
                else:
                    yield result.judged

    def close(self) -> None:
        """Give up what the workers are at, and leave the cluster; the workers stay."""
        self._cluster.close()
        self._source.close()


class _Stock:
    """Units that are to be given out: suspects, those that only stood in line, and new ones."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self.suspects = deque[Unit]()
        self.again = deque[Unit]()
        self._units = iter(units)
        self._retry = Retry()

    def is_empty(self) -> bool:
        """Tell whether there is nothing left."""
        if not self.suspects and not self.again:
            self.again.extend(self.take())
        return not self.suspects and not self.again

    def take(self) -> list[Unit]:
        """Return one that is no suspect, or nothing if there is none."""
        if self.again:
            return [self.again.popleft()]
        unit = next(self._units, None)
        return [] if unit is None else [unit]

    def take_back(self, worker: WorkerState) -> Iterator[list[Judged]]:
        """Take what a dead worker had; yield what is said without running it."""
        lost = [unit for _, unit in worker.flying.values()]
        worker.flying.clear()
        # Workers do first what they were given first.
        for unit in lost[: worker.threads]:
            todo, said = self._retry.again(unit)
            self.suspects += todo
            if said:
                yield said
        self.again += lost[worker.threads :]


def _deal(stock: _Stock, cluster: DaskCluster) -> None:
    """Give out units, each to the worker that has the fewest."""
    ready = [worker for worker in cluster.workers if worker.is_ready]
    for worker in ready:
        if not worker.flying:
            worker.has_suspect = False
            if stock.suspects:
                cluster.give(worker, stock.suspects.popleft())
                worker.has_suspect = True
    # While suspects wait, the others get nothing: nobody would ever be free for one.
    free = [worker for worker in ready if not worker.has_suspect]
    while free and not stock.suspects:
        worker = min(free, key=lambda worker: len(worker.flying) / worker.threads)
        if len(worker.flying) >= _AHEAD * worker.threads:
            return
        taken = stock.take()
        if not taken:
            return
        cluster.give(worker, taken[0])


def _connect(address: str) -> Client:
    # Without an address Dask would start a cluster of its own; without a port it never gives up.
    if re.search(r":\d+/?$", address):
        with suppress(OSError, ValueError):
            # A client waits for ever for a peer that takes the connection and says nothing.
            asyncio.run(asyncio.wait_for(_greet(address), _CONNECT_S))
            return Client(address, timeout=_CONNECT_S, set_as_default=False, name="nbdproxy")
    raise UsageError(
        f"no Dask scheduler answers at {address or 'an empty address'}; start one with: "
        "dask scheduler, and name the address that it prints, such as tcp://host:8786"
    )


async def _greet(address: str) -> None:
    comm = await connect(address, **Security().get_connection_args("client"))
    comm.abort()

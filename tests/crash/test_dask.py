"""`DaskRunner` on a real cluster of processes: the rows are those of this process alone.

Also with a worker killed at work, a state that kills every worker, pieces instead of shared
storage, and a cluster that is not there (any more). Not covered: several machines, and TLS.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from nbdproxy import __version__
from nbdproxy.crash.explore.dask import worker as dask_worker
from nbdproxy.crash.explore.dask.runner import DaskRunner
from nbdproxy.crash.explore.dask.worker import WorkerReady, WorkOrder, identity_of
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, Unit
from nbdproxy.crash.explore.workers import LocalRunner
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import NbdproxyError, UsageError
from nbdproxy.oracles.check import Verdict
from nbdproxy.state_server.commands import CommandPlan
from tests.support.exploring import DIES_ONCE, ODD, Case, Told, ext4_case, random_case


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dask")


class Cluster:
    """A scheduler in this process, and workers that are not started again when they die."""

    def __init__(self, scheduler: LocalCluster, folder: Path) -> None:
        self.scheduler_address: str = scheduler.scheduler_address
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def pids(self) -> set[int]:
        """The workers' processes that are alive."""
        return {one.pid for one in self._processes if one.poll() is None}

    def ensure(self, count: int) -> None:
        """Start workers until there are so many; they join when they are ready."""
        for _ in range(count - len(self.pids())):
            words = [sys.executable, "-m", "distributed.cli.dask_worker", self.scheduler_address]
            words += ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--death-timeout", "60"]
            log = (self._folder / f"log{len(self._processes)}").open("wb")
            with log:
                words += ["--local-directory", str(self._folder)]
                self._processes.append(subprocess.Popen(words, stdout=log, stderr=log))

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def started(scratch: Path) -> Iterator[Cluster]:
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as scheduler,
        closing(Cluster(scheduler, scratch)) as cluster,
    ):
        yield cluster


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """The cluster, with two workers that have joined or will."""
    started.ensure(2)
    return started


@pytest.fixture(scope="module")
def random_one(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A recording of random requests, and a check by a command."""
    return random_case(tmp_path_factory.mktemp("random"), 1)


@pytest.fixture(scope="module")
def ext4_one(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A recording of a filesystem on an image that is needed, and a check by a manifest."""
    return ext4_case(tmp_path_factory.mktemp("ext4"))


@pytest.fixture(scope="module")
def cases(random_one: Case, ext4_one: Case) -> list[Case]:
    """Both."""
    return [random_one, ext4_one]


@pytest.fixture(scope="module")
def expected(cases: list[Case]) -> dict[Path, list[Told]]:
    """What this process says."""
    return {case.run: case.explore(LocalRunner) for case in cases}


def judged_by(case: Case, command: str) -> Case:
    return Case(case.run, CommandPlan(command, 30), case.states, case.seed, case.cuts)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "pieces"])
@pytest.mark.parametrize("kind", [0, 1], ids=["random", "ext4"])
def test_the_same_rows_as_here(
    cluster: Cluster, cases: list[Case], expected: dict[Path, list[Told]], kind: int, shared: bool
) -> None:
    case = cases[kind]
    told: list[str] = []
    make = partial(DaskRunner, address=cluster.scheduler_address, shared=shared, tell=told.append)
    found = case.explore(make)
    assert found == expected[case.run]
    assert len({row.verdict for row in found}) == 2
    assert told == ([] if shared else [told[0]])
    assert shared or "do not see the recording; they are handed it" in told[0]


def test_a_worker_that_is_killed_loses_nothing(
    cluster: Cluster, random_one: Case, expected: dict[Path, list[Told]], tmp_path: Path
) -> None:
    before = cluster.pids()
    once = tmp_path / "once"
    case = judged_by(random_one, DIES_ONCE.format(once) + ODD)
    states = Counter[str]()

    class Counting(DaskRunner):
        def run(self, units: Any) -> Iterator[Any]:
            for judged in super().run(units):
                states.update(one.state for one in judged)
                yield judged

    found = case.explore(
        lambda job: Counting(job, cluster.scheduler_address, shared=False, tell=lambda _text: None)
    )
    assert once.is_dir()
    assert len(before - cluster.pids()) == 1
    assert found == expected[case.run]
    assert set(states.values()) == {1}


def test_a_state_that_kills_every_worker_is_unknown_and_no_other(
    cluster: Cluster, random_one: Case, expected: dict[Path, list[Told]]
) -> None:
    # Results that were not fetched are lost with a worker: then another unit is suspected first.
    cluster.ensure(4)
    with Client(cluster.scheduler_address) as client:
        client.wait_for_workers(4, timeout=120)  # else the state may kill all that there are
    rows = expected[random_one.run][:12]
    deadly = rows[2].state
    case = judged_by(random_one, f'test "$state" != "{deadly}" || kill -9 $PPID; {ODD}')
    runner = DaskRunner(case.job, cluster.scheduler_address)
    found = list(runner.run([Unit(row.position, (row.state,)) for row in rows]))
    runner.close()
    verdicts = {one.state: one.judgement.verdict for judged in found for one in judged}
    assert len(found) == len(rows)
    assert verdicts == {row.state: row.verdict for row in rows} | {deadly: Verdict.UNKNOWN}


def test_what_is_damaged_in_a_workers_cache_is_handed_again(
    cluster: Cluster, scratch: Path, ext4_one: Case, expected: dict[Path, list[Told]]
) -> None:
    make = partial(
        DaskRunner, address=cluster.scheduler_address, shared=False, tell=lambda _text: None
    )
    ext4_one.explore(make)
    (cache,) = scratch.glob("dask-scratch-space*/nbdproxy")
    for run in (cache / "runs").iterdir():
        run.rename(run.with_name("away-" + run.name))
    for piece in (cache / "pieces").iterdir():
        piece.write_bytes(bytes(piece.stat().st_size))
    assert ext4_one.explore(make) == expected[ext4_one.run]


def order(job: EvaluatorSetup, of: Case) -> WorkOrder:
    """An order for one recording with the identity of another."""
    with RecordedSource(of.run) as source:
        return WorkOrder("key", __version__, job, identity_of(source, None), shared=True)


def test_another_recording_at_the_same_path_is_not_taken(random_one: Case, ext4_one: Case) -> None:
    answer = dask_worker.enlist(order(random_one.job, ext4_one))
    assert answer == WorkerReady(False)
    assert dask_worker.enlist(order(random_one.job, random_one)).is_ready
    dask_worker.dismiss("key")


def test_a_bench_that_was_closed_is_opened_again(
    cluster: Cluster, random_one: Case, expected: dict[Path, list[Told]]
) -> None:
    closed = []

    def close_all(key: str) -> None:
        with Client(cluster.scheduler_address, set_as_default=False) as client:
            closed.append(client.run(dask_worker.dismiss, key))

    class Closing(DaskRunner):
        def run(self, units: Any) -> Iterator[Any]:
            for judged in super().run(units):
                if not closed:
                    close_all(self._cluster._order.key)
                yield judged

    found = random_one.explore(lambda job: Closing(job, cluster.scheduler_address))
    assert closed
    assert found == expected[random_one.run]


def test_an_error_of_the_judge_is_raised(cluster: Cluster, random_one: Case) -> None:
    runner = DaskRunner(random_one.job, cluster.scheduler_address)
    with pytest.raises(UsageError, match="is not the id of a crash state"):
        list(runner.run([Unit(3, ("nonsense",))]))
    runner.close()


def test_no_scheduler(random_one: Case) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"no Dask scheduler answers at {address}; start one"):
            DaskRunner(random_one.job, address)


@pytest.mark.parametrize("address", ["", "foo", "nonsense://host", "nonsense://host:1"])
def test_no_address(random_one: Case, address: str) -> None:
    with pytest.raises(UsageError, match=r"no Dask scheduler answers at .*; start one"):
        DaskRunner(random_one.job, address)


def test_a_peer_that_says_nothing_is_no_scheduler(
    random_one: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdproxy.crash.explore.dask.runner._CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"no Dask scheduler answers at {address}; start one"):
            DaskRunner(random_one.job, address)


def test_a_client_that_does_not_close_is_given_up(
    cluster: Cluster, random_one: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[Client] = []

    def never(client: Client, timeout: float) -> None:
        clients.append(client)
        client.status = "closing"
        raise TimeoutError

    runner = DaskRunner(random_one.job, cluster.scheduler_address)
    with monkeypatch.context() as patch:
        patch.setattr(Client, "close", never)
        runner.close()
    [client] = clients
    assert client.status == "closed"
    client.status = "running"
    client.close()


def test_no_worker_and_then_no_scheduler(random_one: Case) -> None:
    units = [Unit(3, ("s",))]
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster:
        runner = DaskRunner(random_one.job, cluster.scheduler_address, patience_s=0.1)
        with pytest.raises(NbdproxyError, match=r"no worker for 0\.1 s; start some .* --resume"):
            list(runner.run(units))
    with pytest.raises(NbdproxyError, match=r"the .*scheduler .*; start it again, and go on with"):
        list(runner.run(units))
    runner.close()


def test_workers_of_another_version_are_refused(
    cluster: Cluster, random_one: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("nbdproxy.crash.explore.dask.runner.__version__", "0.0.0")
    runner = DaskRunner(random_one.job, cluster.scheduler_address, tell=told.append)
    with pytest.raises(NbdproxyError, match=r"no worker can be used \(nbdproxy is .* install the"):
        list(runner.run([Unit(3, ("s",))]))
    runner.close()
    assert told

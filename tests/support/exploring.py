"""Small recordings, and explorations of them whose rows can be compared.

What is compared of a state is all but how its verdict was found, which depends on who found it.
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup
from nbdproxy.crash.explore.explore import Exploration, Tally
from nbdproxy.crash.explore.judging import JudgePlan, ManifestPlan
from nbdproxy.crash.explore.planning import Every, ExploreOptions, cuts_of, make_plan
from nbdproxy.crash.explore.verdicts import Verdicts
from nbdproxy.crash.explore.workers import Runner
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.persistence.model import Level, Options
from nbdproxy.state_server.commands import CommandPlan
from tests.support import ext4
from tests.support.forked import ForkedServer
from tests.support.serving import until
from tests.support.workload import Load, make_image

ODD = 'test $(( $(cksum <"$image" | cut -d" " -f1) % 2 )) = 1'
"""A check by the content of the whole disk; half of all contents pass."""

DIES_ONCE = "test -d '{0}' || {{ mkdir '{0}' && kill -9 $PPID; }}; "
"""Put before a check, kills the process that judges with the first state, and makes a folder."""


class Told(NamedTuple):
    """What is said of a state, whoever judged it."""

    state: str
    number: int
    position: int
    stage: str
    content: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Case:
    """A recording, how to judge it, and how many states to visit at how many cuts at most."""

    run: Path
    judge: JudgePlan
    states: int = 60
    seed: int = 1
    cuts: int = 5

    @property
    def job(self) -> EvaluatorSetup:
        """What a runner needs."""
        return EvaluatorSetup(self.run, None, Level.FLUSHED, Options(), self.judge)

    def explore(
        self,
        make: Callable[[EvaluatorSetup], Runner],
        *,
        database: Path | None = None,
        resume: bool = False,
        progress: Callable[[Tally], None] = lambda _: None,
    ) -> list[Told]:
        """Explore with a runner, and return what `database` has in the end."""
        with RecordedSource(self.run) as source, closing(Timeline(source)) as timeline:
            fields = CrashSpaceBuilder(timeline, Level.FLUSHED, Options())
            cuts = cuts_of(source, timeline.durability(Options()), Level.FLUSHED, Every.FLUSH)
            chosen = cuts[-self.cuts :]
            wish = ExploreOptions(self.states, self.seed)
            plan = make_plan(fields, chosen, wish, cuts_possible=len(cuts))
            with closing(Verdicts(database, {"case": repr(self.run)}, resume=resume)) as verdicts:
                exploration = Exploration(fields, plan, self.judge, verdicts)
                with closing(make(self.job)) as runner:
                    tally = exploration.run(runner, progress)
                assert tally.visited <= plan.visits
                rows = list(verdicts.rows())
        found = [Told(*row[:5], row.judgement.verdict) for row in rows]
        assert [told.number for told in found] == list(range(tally.visited))
        return found


def random_case(folder: Path, seed: int, command: str = ODD, *, killed: bool = False) -> Case:
    """Record random requests until they are enough; states are checked by a command."""
    dice = random.Random(seed)
    make_image(folder / "image", dice)
    with ForkedServer(folder, folder / "image", "--record", str(folder / "run")) as server:
        load = Load(server.client, seed, 2)
        until(lambda: load.sent >= 150, "enough was sent")
        server.signal(signal.SIGKILL if killed else signal.SIGTERM)
        server.wait()
        load.join()
    return Case(folder / "run", CommandPlan(command, 30))


def ext4_case(folder: Path) -> Case:
    """Record two files written to an ext4, one of them flushed; judged by a manifest of both."""
    images = ext4.stages(folder)
    (folder / "image").write_bytes(images[0])
    with ForkedServer(folder, folder / "image", "--record", str(folder / "run")) as server:
        client = server.client()
        ext4.replay_stage(client, images[0], images[1])
        client.flush()
        ext4.replay_stage(client, images[1], images[2])
        client.disc()
        server.signal(signal.SIGTERM)
        server.wait()
    contents = {name: ext4.content(name) for name in (ext4.FLUSHED, ext4.UNFLUSHED)}
    entries = tuple(
        Entry(f"/{name}", hashlib.sha256(content).hexdigest(), len(content))
        for name, content in contents.items()
    )
    return Case(folder / "run", ManifestPlan(Manifest(entries), Tree(), {}), states=200)

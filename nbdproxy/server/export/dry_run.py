"""Runs a policy's example through the real `Export`, on a small disk in memory and a mock clock.

Each step is a batch of its own. A reply is waited for as long as anything is due; time passes only
when nothing else happens, so a story of hours takes milliseconds. What becomes of sockets and of
QEMU's monitor is not covered: their events only reach the export.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio
import trio.testing

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.nbd.constants import SIMPLE_REPLY_MAGIC
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.effects import SECTOR
from nbdproxy.policy.examples import GONE, NONSENSE, SILENCE, Example, Step
from nbdproxy.policy.model import Policy
from nbdproxy.requests import Command, CommandFlag, Request, error_name
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.export.jobs import Job, LinkDroppedError
from nbdproxy.server.export.places import find_places
from nbdproxy.server.export.spoiling import spoiled

_REPLY = struct.Struct(">IIQ")
_LONGEST_S = 86400.0
_OK = "ok"


@dataclass(frozen=True, slots=True)
class Played:
    """How one step ended: its outcome, its seconds, the rules that matched, and what is `wrong`."""

    step: Step
    outcome: str
    after_s: float
    rules: tuple[str, ...]
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class DryRun:
    """How an example ended; `wrong` is empty if all was as it says."""

    played: tuple[Played, ...]
    image: str
    shows: str
    wrong: tuple[str, ...]


def dry_run(policy: Policy, example: Example) -> DryRun:
    """Run an example of a policy whose parameters are as the example wants them."""
    clock = trio.testing.MockClock()
    return trio.run(_Stage(policy, example, clock).play, clock=clock)


@dataclass(slots=True)
class _Answer:
    """The reply to a request, as far as it has come."""

    done: bool = False
    outcome: str = SILENCE
    jobs: list[Job] = field(default_factory=list)


class _Stage:
    def __init__(self, policy: Policy, example: Example, clock: trio.testing.MockClock) -> None:
        self._example = example
        self._clock = clock
        self._image = MemoryDisk(b"-" * example.sectors * SECTOR)
        self._policy = policy
        self._client = 1
        self._shows = ""

    async def play(self) -> DryRun:
        """Play all steps, and see what is left."""
        self._export = Export(
            "",
            ImageStore(self._image),
            self._policy,
            seed=self._example.seed,
            places=find_places(self._policy, self._image),
        )
        played = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._export.run)
            await self._settle()
            for step in self._example.steps:
                before = self._matched()
                played.append(await self._play(step, before, nursery))
            self._look()
            if not self._export.power.off:
                await self._export.active.store.sync()
            nursery.cancel_scope.cancel()
        image = letters(self._image.pread(0, self._image.size))
        wrong = [f'step "{one.step.text}": {one.wrong}' for one in played if one.wrong]
        for what, wanted, found in (
            ("image", self._example.image, image),
            ("shows", self._example.shows, self._shows),
        ):
            if wanted and "".join(wanted) != found:
                wrong.append(f"{what} is {' '.join(found)} and not {' '.join(wanted)}")
        return DryRun(tuple(played), image, self._shows, tuple(wrong))

    async def _play(self, step: Step, before: dict[str, int], nursery: trio.Nursery) -> Played:
        began = trio.current_time()
        if step.command is None:
            await self._happen(step)
            outcome, wrong, after_s = "", "", 0.0
        else:
            answer = _Answer()
            nursery.start_soon(self._request, step, answer)
            while await self._settle() and not answer.done and await self._pass_time():
                pass
            after_s = round(trio.current_time() - began, 6) if answer.done else 0.0
            outcome = answer.outcome
            wrong = _compare(step, outcome, after_s, dark=self._export.power.off)
        rules = [name for name, count in self._matched().items() if count > before.get(name, 0)]
        return Played(step, outcome, after_s, tuple(rules), wrong)

    def _matched(self) -> dict[str, int]:
        return self._export.active.matched

    async def _request(self, step: Step, answer: _Answer) -> None:
        request = _request(step)
        replies = Replies()
        jobs = self._export.handle(self._client, [request], replies)
        parts, decision, dropped = replies.take(), None, False
        for job in jobs:
            decision = job.decision
            late = Replies()
            try:
                if await self._export.finish(self._client, job, late):
                    parts += late.take()
            except LinkDroppedError:
                dropped = True
        sent, drops = spoiled(decision, parts)
        if dropped or drops:
            answer.outcome, answer.done = GONE, True
        elif sent and not self._export.power.off:
            answer.outcome, answer.done = _read(b"".join(sent), request), True

    async def _happen(self, step: Step) -> None:
        export = self._export
        match step.event:
            case "client":
                self._client = int(step.word)
            case "wait":
                await self._wait(float(step.word))
            case "mark":
                export.mark(step.word)
            case "qmp" if not export.power.off:
                export.qmp(step.word, "")
            case "lift":
                export.lift()
            case "disconnect" | "vanish" if not export.power.off:
                export.client_left(said=step.event == "disconnect")
            case "exit":
                self._look()
                if not export.power.off:
                    export.exits("exit")
        await self._settle()

    def _look(self) -> None:
        """See what reads show, or would after a cut; the first look counts."""
        if self._shows:
            return
        if self._export.power.off:
            self._shows = letters(self._image.pread(0, self._image.size))
            return
        found = bytearray(self._image.size)
        self._export.active.store.try_read(0, memoryview(found))
        self._shows = letters(bytes(found))

    async def _settle(self) -> bool:
        """Return True when nothing happens any more, unless time passes."""
        while True:
            await trio.testing.wait_all_tasks_blocked()
            limiter = trio.to_thread.current_default_thread_limiter()
            if limiter.borrowed_tokens or self._export.active.store.in_threads:
                await trio.testing.wait_all_tasks_blocked(0.001)
                continue
            if self._export.power.off:
                await self._export.cut()
            return True

    async def _pass_time(self) -> bool:
        """Let time pass until something is due; False if nothing ever is."""
        seconds = trio.lowlevel.current_statistics().seconds_to_next_deadline
        if seconds > _LONGEST_S:
            return False
        self._clock.jump(max(0.0, seconds))
        return True

    async def _wait(self, seconds: float) -> None:
        end = trio.current_time() + seconds
        while await self._settle():
            due = trio.lowlevel.current_statistics().seconds_to_next_deadline
            if trio.current_time() + due > end:
                break
            self._clock.jump(max(0.0, due))
        self._clock.jump(end - trio.current_time())


def letters(content: bytes) -> str:
    """Return a letter for each sector: its own, "0" for zeroes, "?" for a mix."""
    found = ""
    for at in range(0, len(content), SECTOR):
        sector = content[at : at + SECTOR]
        uniform = sector == sector[:1] * len(sector)
        letter = chr(sector[0])
        found += ("0" if letter == "\0" else letter) if uniform and ord(letter) < 127 else "?"
    return found


def _request(step: Step) -> Request:
    assert step.command is not None
    flags = CommandFlag.FUA if step.fua else 0
    if step.command is Command.FLUSH:
        return Request(step.command, flags, 1, 0, 0, memoryview(b""))
    payload = b"".join(letter.encode() * SECTOR for letter in step.letters)
    place = step.sector * SECTOR, step.count * SECTOR
    return Request(step.command, flags, 1, *place, memoryview(bytearray(payload)))


def _read(reply: bytes, request: Request) -> str:
    """Return what a reply says."""
    data = request.length if request.command == Command.READ else 0
    magic, error, cookie = _REPLY.unpack_from(reply)
    fits = len(reply) == _REPLY.size + (0 if error else data)
    if magic != SIMPLE_REPLY_MAGIC or cookie != request.cookie or not fits:
        return NONSENSE
    if error:
        return error_name(error)
    return letters(reply[_REPLY.size :]) if data else _OK


def _compare(step: Step, outcome: str, after_s: float, *, dark: bool) -> str:
    """Return what is not as the story says, nothing if all is."""
    wanted = step.outcome
    if not wanted:
        reads = step.command is Command.READ and len(outcome) == step.count
        if outcome != _OK and not reads and not (dark and outcome == SILENCE):
            return f"the outcome is {outcome}"
    elif outcome != wanted:
        return f"the outcome is {outcome}"
    if abs(after_s - step.after_s) > 1e-3:
        return f"the reply came after {after_s:g} s"
    return ""


def explain(played: Sequence[Played]) -> list[str]:
    """Return a line for each step: what it was, what came of it, which rules matched."""
    lines = []
    for one in played:
        said = one.step.text.partition("->")[0].strip()
        came = f" -> {one.outcome}" if one.outcome else ""
        late = f" after {one.after_s:g} s" if one.after_s else ""
        by = f"   [{', '.join(one.rules)}]" if one.rules else ""
        lines.append(f"{said}{came}{late}{by}")
    return lines

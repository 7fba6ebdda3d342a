"""One disk as its clients see it: where requests meet policy, recording and store.

`handle` does a whole batch at once (`fast_path.py`): record *received*, do what the store can do
without blocking, record *completed*, prepare the replies. What may block comes back as jobs, which
`finish` does beside the event loop (`slow_path.py`).

Guarantees: a request is in the recording before it touches the disk, and its completion before the
reply leaves. A flush makes durable what was completed before it was received, in whichever
connection. Changes of the same range are done in the order received. After a cut no reply leaves
and nothing is destaged, but what the policy lets survive. If the recording cannot grow, no
modification succeeds any more, and `failure` is set.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import trio

from nbdproxy.errors import ImageError, NbdproxyError, RecordingError
from nbdproxy.nbd.events import Refused
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.model import QMP_CUTS, CutEvent, Policy
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import MODIFYING, Request
from nbdproxy.server.below.store import Store
from nbdproxy.server.export.active_policy import ActivePolicy
from nbdproxy.server.export.fast_path import FastPath
from nbdproxy.server.export.gate import Gate
from nbdproxy.server.export.jobs import Counters, Job
from nbdproxy.server.export.offer import offer
from nbdproxy.server.export.places import NOWHERE, RulePlaces, find_places
from nbdproxy.server.export.request_log import RecordingLog, RequestLog
from nbdproxy.server.export.slow_path import SlowPath
from nbdproxy.server.shared.complaints import disk_complaints


class Export:
    """The store `base` under a policy, recorded or not. Owns its disk; the recorder is its owner's.

    `offered` is what the disk below can do, if that is less than everything; `shared` is False
    where each connection has its own.
    """

    def __init__(
        self,
        name: str,
        base: Store,
        policy: Policy,
        *,
        description: str = "",
        read_only: bool = False,
        shared: bool = True,
        recorder: RecordingWriter | None = None,
        offered: ExportInfo | None = None,
        seed: int = 0,
        places: RulePlaces = NOWHERE,
    ) -> None:
        size = base.disk.size
        self.info = offer(name, size, description, offered, read_only=read_only, shared=shared)
        self.power = base.power
        self.recorder = recorder
        """The recording, if there is one."""
        self.request_log = RecordingLog(recorder) if recorder is not None else RequestLog()
        self.held_at_cut = 0
        """Bytes that the cut took back."""
        self.ending = trio.Event()
        """The serving is about to end: what hangs has little time left."""
        self.ended = "nbdproxy failed"
        """How the serving ended, for the recording."""
        self._base = base
        self._gate = Gate()
        self._pausing = trio.Lock()
        self._cutting = trio.Lock()
        self._cut_noted = False
        self._background = trio.CancelScope()
        self._numbers = itertools.count()
        self._active = self._make_active(policy, seed, places)
        self._fast_path = FastPath(self.request_log, self.power, self._active)
        self._slow_path = SlowPath(self.request_log, self.power, self._active)

    def _make_active(self, policy: Policy, seed: int, places: RulePlaces) -> ActivePolicy:
        active = ActivePolicy(
            policy,
            self._base,
            number=next(self._numbers),
            seed=seed,
            places=places,
            fail=self.request_log.fail,
        )
        self.note(NoteKind.POLICY, active.describe())
        return active

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._active.policy

    @property
    def active(self) -> ActivePolicy:
        """The policy in force, at work."""
        return self._active

    @property
    def failure(self) -> NbdproxyError | None:
        """Why it stopped, if it did."""
        return self.request_log.failure

    @property
    def counters(self) -> Counters:
        """What passed."""
        return self._fast_path.counters

    def watch_before_flush(self, watch: Callable[[], object]) -> None:
        """Let `watch` be called before a flush is received: the last chance for a cut."""
        self._fast_path.before_flush = watch

    async def prepare(self, requests: Sequence[Request | Refused]) -> None:
        """Wait for what `handle` would block on: cold before-images, a slow recording.

        What fails here fails again in `handle`, and is answered there. Only what is recorded has
        anything to prepare.
        """
        if not self.request_log.records or self.power.off or self.failure is not None:
            return
        try:
            payload = sum(len(r.payload) for r in requests if type(r) is Request)
            await self.request_log.make_room(payload)
            await self._active.store.prepare(
                [r for r in requests if type(r) is Request and r.command in MODIFYING]
            )
        except RecordingError as full:
            self.request_log.fail(full)
        except OSError as error:
            disk_complaints.warn("a before-image cannot be read", str(error))

    def handle(
        self, connection: int, requests: Sequence[Request | Refused], replies: Replies
    ) -> list[Job]:
        """Do a batch that was read off one connection together; return what has to wait."""
        return self._fast_path.handle(connection, requests, replies)

    async def finish(self, connection: int, job: Job, replies: Replies) -> bool:
        """Do a job and prepare its reply; False if the power went in between.

        Raises LinkDroppedError where a rule drops the connection instead.
        """
        if job.claim is None:
            await self._gate.passed()
        self._gate.enter()
        try:
            return await self._slow_path.finish(connection, job, replies)
        finally:
            self._gate.leave()

    async def cut(self) -> None:
        """Finish a cut of the power: return when nothing is destaged any more."""
        assert self.power.off
        async with self._cutting:
            store = self._active.store
            held = await store.settled()
            if self._cut_noted:
                return
            self._cut_noted = True
            self.held_at_cut = held
            survived = await store.leave_survivors()
            if survived:
                self.note(NoteKind.FAULT, survived)
            self.note(NoteKind.CUT, self.power.reason)

    def client_left(self, *, said: bool) -> None:
        """Take note that a client left, saying DISC or not: the policy may cut the power."""
        event = CutEvent.DISC if said else CutEvent.EOF
        if self.policy.cut.at & {CutEvent.DISCONNECT, event}:
            self.power.cut("the client said DISC" if said else "the client went away")

    def exits(self, reason: str) -> None:
        """Take note that nbdproxy ends: the policy may cut the power."""
        if CutEvent.EXIT in self.policy.cut.at:
            self.power.cut(reason)

    def qmp(self, event: str, text: str) -> None:
        """Take note of an event of QEMU's monitor: rules watch it, and the policy may cut."""
        self.note(NoteKind.QMP, text)
        self._happened(f"qmp:{event}")
        if QMP_CUTS.get(event) in self.policy.cut.at:
            self.power.cut(f"QEMU reported {event}")

    def mark(self, name: str) -> None:
        """Mark this instant in the recording, and for rules that watch for it."""
        self.note(NoteKind.MARK, name)
        self._happened(f"mark:{name}")

    def _happened(self, event: str) -> None:
        self._active.engine.happened(event)

    def lift(self) -> None:
        """Let reads show what the disk holds again, wherever a rule made it otherwise."""
        if self._active.store.lift():
            self.note(NoteKind.FAULT, json.dumps({"action": "lift"}))

    @property
    def paused(self) -> bool:
        """Whether requests have to wait."""
        return self._gate.shut

    async def passed(self) -> None:
        """Return when it is not paused."""
        await self._gate.passed()

    async def pause(self) -> None:
        """Let nothing new begin, finish what was begun, and make all of it durable on the image.

        Returns when nothing is at work any more. Requests that hang are not waited for. Raises
        ImageError if the image cannot take it, or if the power goes meanwhile; nothing is paused
        then that was not before.
        """
        async with self._pausing:
            was_paused = self.paused
            self._gate.close()
            try:
                await self._fast_path.claims.settled()
                await self._gate.emptied()
                await self._active.store.sync()
                if self.power.off:
                    raise ImageError(f"the power went meanwhile ({self.power.reason})")
            except OSError as error:
                if not was_paused:
                    self.resume()
                if isinstance(error, ImageError):
                    raise
                reason = error.strerror or str(error)
                raise ImageError(f"what is held cannot be made durable: {reason}") from None

    def resume(self) -> None:
        """Let requests go on."""
        self._gate.open()

    async def change_policy(self, policy: Policy, seed: int) -> None:
        """Let another policy come into force between two requests; faults are lifted.

        What the cache holds is made durable first. Raises PolicyError if the policy asks for a
        place that the disk does not have; the old one stays then.
        """
        was_paused = self.paused
        await self.pause()
        try:
            places = await trio.to_thread.run_sync(find_places, policy, self._base.disk)
            old, self._active = self._active.store, self._make_active(policy, seed, places)
            self._fast_path.adopt(self._active)
            self._slow_path.adopt(self._active)
            self._background.cancel()
            old.close()
        finally:
            if not was_paused:
                self.resume()

    async def run(self) -> None:
        """Do what the policy does on its own, until cancelled."""
        self._fast_path.begin()
        while True:
            with trio.CancelScope() as self._background:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._active.store.run)
                    if self.policy.cut.after_s is not None:
                        nursery.start_soon(self._cut_later, self.policy.cut.after_s)

    async def _cut_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.power.cut(f"{seconds:g} s have passed")

    def note(self, kind: NoteKind, text: str = "", *, connection: int = 0) -> None:
        """Put an event that is not a request into the recording, if there is one."""
        self.request_log.note(kind, text, connection=connection)

    def fail(self, error: NbdproxyError) -> None:
        """Stop for good: the recording is full, or the server below is gone."""
        self.request_log.fail(error)

    def sync(self) -> None:
        """Make everything durable, held or not: an orderly end; blocks."""
        self._active.store.disk.sync()

    def bake(self) -> None:
        """Write the faults that are shown to the image; blocks."""
        self._active.store.bake(self._base.disk)

    def close(self) -> None:
        """Close the disk, dropping what is held."""
        self._active.store.close()
        self._base.disk.close()

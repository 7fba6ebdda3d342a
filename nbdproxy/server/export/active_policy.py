"""A policy in force on one disk: the cache, the rules, the faults and the write-back it needs.

An `Export` has one regime at a time. What does not hang on the policy (recording, connections,
claims) is the export's.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import trio

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.volatile import VolatileDisk
from nbdproxy.errors import RecordingError
from nbdproxy.extents import Extent
from nbdproxy.policy.engine import Decision, Engine
from nbdproxy.policy.model import Handling, Policy, Survivors, handling
from nbdproxy.policy.survival import surviving
from nbdproxy.requests import MODIFYING, Command, CommandFlag, Request
from nbdproxy.server.below.remote import Remote
from nbdproxy.server.export.destage_queue import DestageQueue
from nbdproxy.server.export.faults import Faults
from nbdproxy.server.export.jobs import RequestFailure
from nbdproxy.server.export.places import RulePlaces
from nbdproxy.server.export.slow_path import SlowPath
from nbdproxy.server.export.write_back import WriteBack
from nbdproxy.server.power import Power

_MANY = 4096
"""Positions in the recording that are remembered before those of landed writes are dropped."""

_LISTED = 1000
"""Surviving pieces that are listed one by one in the recording."""


class ActivePolicy:
    """`policy` on `disk`, which the caller owns. `remote` is set where changes are passed on.

    `number` tells it from those that were in force before.

    `complete`, `keep` and `fail` are as for `SlowPath`.
    """

    def __init__(
        self,
        policy: Policy,
        disk: BlockDevice,
        *,
        number: int,
        remote: Remote | None,
        power: Power,
        seed: int,
        places: RulePlaces,
        complete: Callable[[int, int, RequestFailure | None], RequestFailure | None],
        keep: Callable[[], Awaitable[RequestFailure | None]],
        fail: Callable[[RecordingError], None],
    ) -> None:
        self.policy = policy
        self.number = number
        self.seed = seed
        self.engine = Engine(policy, seed, places.of) if policy.layers else None
        self.faults = Faults.of(policy, disk.size)
        self.landings: DestageQueue | None = None
        self.volatile: VolatileDisk | None = None
        self.write_back: WriteBack | None = None
        self._metadata = places.metadata
        self._history = policy.cache.writes_back or policy.cut.survives is not Survivors.FLUSHED
        # Where the recording has each held write, by its order in the cache.
        self._seqs: dict[int, int] = {}
        if policy.cache.holds:
            self.volatile = VolatileDisk(disk, history=self._history)
            self.landings = DestageQueue(
                self.volatile,
                power,
                complete=lambda one, how: complete(one.connection, one.seq, how),
                fail=fail,
            )
            if policy.cache.writes_back:
                self.write_back = WriteBack(self.volatile, self.landings, policy.cache, seed)
        self.disk: BlockDevice = self.volatile or disk
        self.remote = remote if self.volatile is None else None
        self.waiting = SlowPath(
            self.disk,
            self.remote,
            self.landings,
            power,
            regime=number,
            faults=self.faults,
            held=self.held,
            complete=complete,
            keep=keep,
            fail=fail,
        )
        self.handling: dict[tuple[int, int], Handling] = {
            (int(command), fua): handling(policy, command, fua)
            for command in (*MODIFYING, Command.FLUSH)
            for fua in (0, int(CommandFlag.FUA))
        }

    @property
    def held_bytes(self) -> int:
        """How many bytes a cut would take back now."""
        return self.volatile.held_bytes if self.volatile is not None else 0

    @property
    def shown_bytes(self) -> int:
        """How many bytes of the disk read otherwise than they are."""
        return self.faults.shown_bytes if self.faults is not None else 0

    @property
    def struck(self) -> dict[str, int]:
        """How often each rule struck."""
        return dict(self.engine.matched) if self.engine is not None else {}

    def held(self, request: Request, seq: int) -> None:
        """Take note that the cache holds a change."""
        if self.volatile is None or not self._history:
            return
        self._seqs[self.volatile.newest_order] = seq
        if len(self._seqs) > _MANY:
            left = {ticket.held.order for ticket in self.volatile.writes()}
            if len(left) < _MANY // 2:
                self._seqs = {order: seq for order, seq in self._seqs.items() if order in left}
        if self.write_back is not None:
            self.write_back.held(request.length)

    def freeze(self) -> int | None:
        """Draw the line under what a flush that was received just now covers."""
        if self.volatile is None:
            return None
        if self.write_back is not None:
            self.write_back.covered()
        return self.volatile.freeze()

    def describe(self) -> str:
        """Return what the recording says of the policy in force, as JSON."""
        policy = self.policy
        facts = {"policies": policy.names, "settings": policy.settings, "seed": self.seed}
        return json.dumps(facts)

    async def run(self) -> None:
        """Do what the policy does on its own, until cancelled."""
        if self.write_back is not None:
            await self.write_back.run()
        await trio.sleep_forever()

    @property
    def in_threads(self) -> bool:
        """Whether a thread is at work on the disk."""
        return self.waiting.in_threads or (self.landings is not None and self.landings.in_thread)

    async def sync(self) -> None:
        """Make everything durable, held or not."""
        if self.landings is not None:
            await self.landings.sync()
        else:
            await trio.to_thread.run_sync(self.disk.sync)

    async def settled(self) -> int:
        """After a cut: wait for the landing that is at work; return the bytes that are held."""
        return await self.landings.settled() if self.landings is not None else 0

    async def leave_survivors(self) -> str | None:
        """After a cut: let on the image what survives it; return what the recording says of it."""
        survives = self.policy.cut.survives
        if self.volatile is None or survives is Survivors.FLUSHED:
            return None
        tickets = self.volatile.writes()
        writes = [Extent(ticket.offset, ticket.length) for ticket in tickets]
        pieces = surviving(survives, writes, self.seed, self._metadata)
        chosen = [(tickets[piece.write], piece.start, piece.end) for piece in pieces]
        await trio.to_thread.run_sync(self.volatile.land_pieces, chosen)
        listed = [
            [self._seqs.get(ticket.held.order), start, end - start]
            for ticket, start, end in chosen[:_LISTED]
        ]
        facts = {"action": "survive", "survives": survives.value, "held": len(writes)}
        facts |= {"pieces": len(pieces), "seq_offset_length": listed}
        return json.dumps(facts)

    def close(self) -> None:
        """Forget faults and what is held; the disk is the caller's."""
        if self.faults is not None:
            self.faults.close()
        if self.volatile is not None:
            self.volatile.release()


def fault_note(request: Request, seq: int, decision: Decision) -> str:
    """Return what the recording says of a rule that struck, as JSON."""
    command = Command(request.command).name.lower().replace("_", "-")
    action = decision.action.kind.value if decision.action is not None else "delay"
    facts: dict[str, object] = {
        "rule": decision.draw_key.rule,
        "action": action,
        "command": command,
    }
    if seq >= 0:
        facts["seq"] = seq
    if request.length:
        facts |= {"offset": request.offset, "length": request.length}
    if decision.delay_s:
        facts["delay_s"] = round(decision.delay_s, 6)
    return json.dumps(facts)

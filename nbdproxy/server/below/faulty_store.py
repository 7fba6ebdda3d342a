"""A faulty disk over a store that stays honest: clients see what the faulty one would show.

A write that a rule loses, tears, misdirects or corrupts is done below as the client sent it; what
reads show instead stands in an overlay, which can be lifted.
"""

from __future__ import annotations

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.faults import FaultOverlay
from nbdproxy.disks.past import NoPast, Past
from nbdproxy.policy.actions import SHOWN_OTHERWISE, ActionKind
from nbdproxy.policy.effects import flipped, shown_after_write, stuck
from nbdproxy.policy.engine import Decision
from nbdproxy.policy.model import Policy
from nbdproxy.requests import Request
from nbdproxy.server.below.store import Over, StackedStore, Store

_PIECE = 1 << 20
"""Bytes of old content read at a time: a TRIM may be as long as the disk."""

_READS = frozenset({ActionKind.STALE, ActionKind.FLIP, ActionKind.STICK})


def shows_faults(policy: Policy) -> bool:
    """Tell whether a policy has rules for which reads show what is not on the disk."""
    kinds = {rule.action.kind for rule in policy.rules}
    return bool(kinds & (SHOWN_OTHERWISE | _READS))


class FaultyStore(StackedStore):
    """The faults of `policy`, over the store `below`."""

    def __init__(self, below: Store, policy: Policy) -> None:
        super().__init__(below)
        self.try_read = self._try_read
        self._read_below = below.try_read
        self._change_below = below.try_change
        self._overlay = FaultOverlay(below.disk.size)
        # Whether each change has to wait until what is there has been read.
        self._needs_old = ActionKind.STALE in {rule.action.kind for rule in policy.rules}
        self._past = Past() if self._needs_old else NoPast()

    def _try_read(self, offset: int, buffer: memoryview) -> bool:
        """Read below, and put in what is shown instead."""
        if not self._read_below(offset, buffer):
            return False
        if len(self._overlay):
            self._overlay.patch(offset, buffer)
        return True

    def try_change(self, request: Request, seq: int, /) -> bool:
        """Change it below, unless what is there has to be read first."""
        if self._needs_old or not self._change_below(request, seq):
            return False
        self._written(request)
        return True

    async def read(self, offset: int, buffer: memoryview, decision: Decision | None, /) -> None:
        """Read below, and put in what is shown instead, or what a rule makes of this READ."""
        await self._below.read(offset, buffer, decision)
        if len(self._overlay):
            self._overlay.patch(offset, buffer)
        action = decision.action if decision is not None else None
        if decision is None or action is None:
            return
        if action.kind is ActionKind.STALE:
            self._past.patch(offset, buffer)
        elif action.kind is ActionKind.FLIP:
            buffer[:] = flipped(bytes(buffer), action.bits, decision.draw_key)
        elif action.kind is ActionKind.STICK:
            buffer[:] = stuck(bytes(buffer), offset, action, decision.draw_key)

    async def change(
        self, request: Request, seq: int, decision: Decision | None, over: Over, /
    ) -> None:
        """Change it below as it was asked for, and show what the rule makes of it."""
        try:
            old = await self._before(request, decision)
        except BaseException:
            over(False)
            raise

        def changed(done: bool) -> None:
            """Show what is left, before a later change of the range may begin."""
            if done:
                self._after(request, decision, old)
            over(done)

        await self._below.change(request, seq, decision, changed)

    async def _before(self, request: Request, decision: Decision | None) -> bytes | None:
        """Keep what is there as far as it is needed; what is returned goes to `_after`."""
        action = decision.action if decision is not None else None
        loses = action is not None and action.kind is ActionKind.LOSE
        if action is not None and action.kind in SHOWN_OTHERWISE and not loses:
            old = await self._shown(request.offset, request.length)
            self._past.keep(request.offset, old)
            return old
        if not self._needs_old and not loses:
            return None
        for at in range(request.offset, request.end, _PIECE):
            old = await self._shown(at, min(_PIECE, request.end - at))
            self._past.keep(at, old)
            if loses:
                self._overlay.show(at, old)
        return None

    async def _shown(self, offset: int, length: int) -> bytes:
        found = bytearray(length)
        await self._below.read(offset, memoryview(found), None)
        self._overlay.patch(offset, memoryview(found))
        return bytes(found)

    def _after(self, request: Request, decision: Decision | None, old: bytes | None) -> None:
        """Show what a change left, once it has been done below."""
        action = decision.action if decision is not None else None
        if decision is not None and action is not None and old is not None:
            self._written(request)
            data = bytes(request.payload)
            for offset, shown in shown_after_write(
                action, decision.draw_key, request.offset, data, old
            ):
                self._overlay.show(offset, shown)
        elif action is None or action.kind is not ActionKind.LOSE:
            self._written(request)

    def _written(self, request: Request) -> None:
        """Show a change that was done as it was asked for."""
        if len(self._overlay):
            self._overlay.hide(request.offset, request.length)

    async def status(self, request: Request) -> list[tuple[int, int]]:
        """Ask below, unless a part of the range is shown otherwise: that may be anything."""
        if self._overlay.touches(request.offset, request.length):
            return [(request.length, 0)]
        return await self._below.status(request)

    @property
    def shown_bytes(self) -> int:
        """How many bytes of the disk read otherwise than they are."""
        return self._overlay.shown_bytes

    def lift(self) -> bool:
        """Show what the disk holds, everywhere."""
        self._overlay.lift()
        return True

    def bake(self, disk: BlockDevice) -> None:
        """Write what is shown to a disk; blocks."""
        self._overlay.bake(disk)

    def close(self) -> None:
        """Forget everything, here and below."""
        self._overlay.close()
        self._past.close()
        super().close()

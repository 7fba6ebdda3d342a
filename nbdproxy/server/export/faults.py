"""Shows clients what a faulty disk would, above a disk that stays honest.

A write that a rule loses, tears, misdirects or corrupts is done below as the client sent it; what
reads show instead stands in an overlay, which can be lifted. Belongs to the event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.faults import FaultOverlay
from nbdproxy.disks.past import Past
from nbdproxy.policy.actions import SHOWN_OTHERWISE, ActionKind
from nbdproxy.policy.effects import flipped, shown_after_write, stuck
from nbdproxy.policy.engine import Decision
from nbdproxy.policy.model import Policy
from nbdproxy.requests import Request

_PIECE = 1 << 20
"""Bytes of old content read at a time: a TRIM may be as long as the disk."""

_READS = frozenset({ActionKind.STALE, ActionKind.FLIP, ActionKind.STICK})
ReadAsync = Callable[[int, int], Awaitable[bytes]]
"""Returns `length` bytes from `offset`, as the honest disk has them."""


class Faults:
    """The faults of one disk of `size` bytes; None of a policy that has none."""

    def __init__(self, policy: Policy, size: int) -> None:
        kinds = {rule.action.kind for rule in policy.rules}
        self._overlay = FaultOverlay(size)
        self._past = Past() if ActionKind.STALE in kinds else None

    @staticmethod
    def of(policy: Policy, size: int) -> Faults | None:
        """Return what a policy needs."""
        kinds = {rule.action.kind for rule in policy.rules}
        return Faults(policy, size) if kinds & (SHOWN_OTHERWISE | _READS) else None

    @property
    def needs_old(self) -> bool:
        """Whether each change has to wait until what is there has been read."""
        return self._past is not None

    @property
    def shown_bytes(self) -> int:
        """How many bytes of the disk read otherwise than they are."""
        return self._overlay.shown_bytes

    async def before(
        self, request: Request, decision: Decision | None, read: ReadAsync
    ) -> bytes | None:
        """Prepare for a change; what is returned goes to `after`."""
        action = decision.action if decision is not None else None
        loses = action is not None and action.kind is ActionKind.LOSE
        if action is not None and action.kind in SHOWN_OTHERWISE and not loses:
            old = await self._shown(request.offset, request.length, read)
            if self._past is not None:
                self._past.keep(request.offset, old)
            return old
        if self._past is None and not loses:
            return None
        for at in range(request.offset, request.end, _PIECE):
            old = await self._shown(at, min(_PIECE, request.end - at), read)
            if self._past is not None:
                self._past.keep(at, old)
            if loses:
                self._overlay.show(at, old)
        return None

    async def _shown(self, offset: int, length: int, read: ReadAsync) -> bytes:
        found = bytearray(await read(offset, length))
        self._overlay.patch(offset, memoryview(found))
        return bytes(found)

    def after(self, request: Request, decision: Decision | None, old: bytes | None) -> None:
        """Show what a change left, once it has been done below."""
        if decision is not None and decision.action is not None and old is not None:
            self.written(request)
            data = bytes(request.payload)
            for offset, shown in shown_after_write(
                decision.action, decision.draw_key, request.offset, data, old
            ):
                self._overlay.show(offset, shown)
        elif (
            decision is None
            or decision.action is None
            or (decision.action.kind is not ActionKind.LOSE)
        ):
            self.written(request)

    def written(self, request: Request) -> None:
        """Show a change that was done as it was asked for."""
        if len(self._overlay):
            self._overlay.hide(request.offset, request.length)

    def touches(self, request: Request) -> bool:
        """Tell whether a part of a request's range is shown otherwise."""
        return self._overlay.touches(request.offset, request.length)

    def patch(self, request: Request, data: memoryview, decision: Decision | None = None) -> None:
        """Put into a READ's `data`, as the honest disk has it, what is shown instead."""
        if len(self._overlay):
            self._overlay.patch(request.offset, data)
        action = decision.action if decision is not None else None
        if decision is None or action is None:
            return
        if action.kind is ActionKind.STALE and self._past is not None:
            self._past.patch(request.offset, data)
        elif action.kind is ActionKind.FLIP:
            data[:] = flipped(bytes(data), action.bits, decision.draw_key)
        elif action.kind is ActionKind.STICK:
            data[:] = stuck(bytes(data), request.offset, action, decision.draw_key)

    def lift(self) -> None:
        """Show what the disk holds, everywhere."""
        self._overlay.lift()

    def bake(self, disk: BlockDevice) -> None:
        """Write what is shown to the disk itself; blocks."""
        self._overlay.bake(disk)

    def close(self) -> None:
        """Forget everything."""
        self._overlay.close()
        if self._past is not None:
            self._past.close()

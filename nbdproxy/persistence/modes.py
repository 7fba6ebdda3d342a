"""QEMU's cache modes x failures: what each cell of the table is bound to leave on the disk.

The table holds for a disk QEMU opens with `format=raw` (nbdproxy in its place, or above a qcow2
file whose own caches are then below). Where QEMU writes qcow2 through nbdproxy, the recording is of
the qcow2 *file*, and the table holds for that file.

A recording taken under writethrough or directsync lacks the guest's flushes and is never projected
onto a mode that would need them. Not covered: what a particular disk cache or network store does
beyond what it must; the worst of it is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from nbdproxy.errors import ProjectionError
from nbdproxy.persistence.model import Level
from nbdproxy.recording.index import NEVER, Mask, RequestTable
from nbdproxy.requests import Command, CommandFlag


class CacheMode(Enum):
    """QEMU's `cache=`."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"


class Failure(Enum):
    """What goes wrong, from the mildest to the worst."""

    GUEST_RESET = "guest-reset"
    GUEST_POWEROFF = "guest-poweroff"
    QEMU_KILL = "qemu-kill"
    HOST_POWER_LOSS = "host-power-loss"
    STORAGE_LOSS = "storage-loss"


CACHED = frozenset({CacheMode.NONE, CacheMode.WRITEBACK, CacheMode.UNSAFE})
"""The guest sees a write cache and flushes it; on an NBD connection the three look alike."""

THROUGH = frozenset({CacheMode.WRITETHROUGH, CacheMode.DIRECTSYNC})
"""The guest sees no cache and never flushes; every write is made durable before it is answered."""


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What a failure leaves for certain; whatever else was received may be there or not."""

    must: Level


_POWER_LOSS = {
    CacheMode.NONE: Level.FLUSHED,
    CacheMode.WRITEBACK: Level.FLUSHED,
    CacheMode.WRITETHROUGH: Level.COMPLETED,
    CacheMode.DIRECTSYNC: Level.COMPLETED,
    CacheMode.UNSAFE: Level.NOTHING,
}
_EVERY_MODE = {
    # QEMU lives on and finishes what it was given.
    Failure.GUEST_RESET: Level.RECEIVED,
    # QEMU drains and flushes before it ends.
    Failure.GUEST_POWEROFF: Level.RECEIVED,
    # What was answered is in the host's page cache or beyond, which does not need QEMU.
    Failure.QEMU_KILL: Level.COMPLETED,
    # The store may have broken every promise; one that kept them is HOST_POWER_LOSS.
    Failure.STORAGE_LOSS: Level.NOTHING,
}


def guarantee(mode: CacheMode, failure: Failure, *, exit_flush_failed: bool = False) -> Guarantee:
    """Return the cell of the table.

    `exit_flush_failed`: the flush that QEMU sends on its way out was answered with an error, so
    that a poweroff leaves for certain only what earlier flushes covered.
    """
    if failure is Failure.HOST_POWER_LOSS:
        return Guarantee(_POWER_LOSS[mode])
    if failure is Failure.GUEST_POWEROFF and exit_flush_failed:
        return Guarantee(Level.FLUSHED)
    return Guarantee(_EVERY_MODE[failure])


def promised(mode: CacheMode) -> Level:
    """Return what a mode tells the guest is durable; unsafe tells the same lie as the others."""
    return Level.COMPLETED if mode in THROUGH else Level.FLUSHED


def recorded_under(table: RequestTable, stated: CacheMode | None = None) -> frozenset[CacheMode]:
    """Tell under which cache modes the recording can have been taken.

    `stated` is what the user knows: it decides between the two behaviours that a connection shows.
    Otherwise THROUGH if every WRITE and WRITE_ZEROES carries FUA, or if there are about as many
    flushes as writes (see `_as_many_flushes`), CACHED if not; all modes if there is nothing to
    tell from. A guest that itself flushes every write looks like THROUGH: the mistake is then a
    refusal, which `stated` lifts, and not a promise too many. A qcow2 file's own metadata hides
    the pattern: for a recording from below qcow2 only `stated` can say THROUGH.
    """
    if stated is not None:
        return THROUGH if stated in THROUGH else CACHED
    writes = np.equal(table.command, Command.WRITE)
    writes |= np.equal(table.command, Command.WRITE_ZEROES)
    if not writes.any():
        return CACHED | THROUGH
    if np.all(table.flags[writes] & CommandFlag.FUA != 0) or _as_many_flushes(table, writes):
        return THROUGH
    return CACHED


def projectable(recorded: frozenset[CacheMode]) -> tuple[CacheMode, ...]:
    """Return the modes that a recording taken under one of `recorded` can be projected onto."""
    return tuple(mode for mode in CacheMode if recorded & CACHED or mode in THROUGH)


def check_projection(recorded: frozenset[CacheMode], modes: Iterable[CacheMode]) -> None:
    """Raise ProjectionError if the recording does not hold what one of `modes` would need."""
    possible = projectable(recorded)
    wrong = [mode.value for mode in modes if mode not in possible]
    if wrong:
        raise ProjectionError(
            f"this recording seems to be taken under writethrough or directsync, where the guest "
            f"sends no flushes, and tells nothing about {', '.join(wrong)}: record again with "
            f"cache=none, ask with --mode writethrough,directsync, or say --recorded-as none if "
            f"QEMU had that"
        )


def _as_many_flushes(table: RequestTable, writes: Mask) -> bool:
    """Tell whether there is a flush for each write, as where QEMU's writethrough lacks FUA.

    Asks for 8 successful writes and 9 flushes to 10 of them. Their order says less: for writes in
    parallel QEMU sends the flushes afterwards, in a row.
    """
    good = np.equal(table.error, 0)
    good &= table.completed != NEVER
    written = int(np.count_nonzero(writes & good))
    return written >= 8 and int(np.count_nonzero(table.is_flush & good)) * 10 >= written * 9

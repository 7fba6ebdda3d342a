"""QEMU's cache modes x failures: what each cell of the table is bound to leave on the disk.

The table holds for a disk QEMU opens with `format=raw` (nbdproxy in its place, or above a qcow2
file whose own caches are then below). Where QEMU writes qcow2 through nbdproxy, the recording is of
the qcow2 *file*, and the table holds for that file.

A recording that may lack the guest's flushes, as under writethrough and directsync, is never
projected onto a mode that would need them. Not covered: what a particular disk cache or network
store does beyond what it must; the worst of it is assumed.
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


def guarantee(mode: CacheMode, failure: Failure, *, exit_flush_failed: bool = False) -> Level:
    """Return what a failure leaves for certain; whatever else was received may be there or not.

    `exit_flush_failed`: the flush that QEMU sends on its way out was answered with an error, so
    that a poweroff leaves for certain only what earlier flushes covered.
    """
    if failure is Failure.HOST_POWER_LOSS:
        return _POWER_LOSS[mode]
    if failure is Failure.GUEST_POWEROFF and exit_flush_failed:
        return Level.FLUSHED
    return _EVERY_MODE[failure]


def promised(mode: CacheMode) -> Level:
    """Return what a mode tells the guest is durable; unsafe tells the same lie as the others."""
    return Level.COMPLETED if mode in THROUGH else Level.FLUSHED


@dataclass(frozen=True, slots=True)
class Taken:
    """What can be told of the cache mode that a recording was taken under.

    modes    those that it can have been taken under
    tells    those that it can be projected onto, in the order of `CacheMode`
    why      why the others are left out, in words; empty if none is
    remark   what was taken for granted, in words; empty if nothing was
    """

    modes: frozenset[CacheMode]
    tells: tuple[CacheMode, ...]
    why: str = ""
    remark: str = ""

    @property
    def left_out(self) -> tuple[CacheMode, ...]:
        """The modes that the recording tells nothing about."""
        return tuple(mode for mode in CacheMode if mode not in self.tells)


def recorded_under(
    table: RequestTable,
    stated: CacheMode | None = None,
    *,
    offers_fua: bool | None = None,
    below_qcow2: bool | None = False,
) -> Taken:
    """Tell under which cache modes the recording can have been taken, and what it tells of.

    `stated` is what the user knows: it decides between the two behaviours that a connection shows.
    `offers_fua` is whether a client could send FUA, `below_qcow2` whether the disk is a qcow2 file;
    None where that is not known.

    Under THROUGH QEMU sends each write with FUA, or, where the server offers none, a flush behind
    each; its qcow2 driver never uses FUA, and writes tables besides. So a plain write where FUA is
    offered shows a cache, and so do writes with and without FUA. A program that syncs each write
    looks like THROUGH in all else: then both are possible, and nothing is said of the modes that
    would need flushes which the guest may not have been able to send.
    """
    raw = below_qcow2 is False
    if stated in THROUGH:
        return _THROUGH_STATED
    writes = np.equal(table.command, Command.WRITE)
    writes |= np.equal(table.command, Command.WRITE_ZEROES)
    if not writes.any():
        return Taken(CACHED | THROUGH, tuple(CacheMode))
    fua = table.flags[writes] & CommandFlag.FUA != 0
    if stated is None and fua.all():
        return _either("every write carries FUA")
    if stated is not None or fua.any():
        return _cached(raw=raw)
    return _by_flushes(table, writes, offers_fua=offers_fua, raw=raw)


def _by_flushes(table: RequestTable, writes: Mask, *, offers_fua: bool | None, raw: bool) -> Taken:
    """Tell what flushes say where no write carries FUA."""
    if not _flushes_to_writes(table, writes, *(_ONE_EACH if raw else _BELOW_QCOW2)):
        return _cached(raw=raw)
    if not raw:
        return _either("below qcow2 it has a flush to every few writes")
    if offers_fua:
        return Taken(CACHED, tuple(CacheMode), remark=_SYNCED)
    known = "" if offers_fua is False else "perhaps "
    return _either(f"it has a flush for each write, and {known}FUA was not offered")


def _either(seen: str) -> Taken:
    return Taken(
        CACHED | THROUGH,
        tuple(mode for mode in CacheMode if mode in THROUGH),
        f"{seen}: so it is where the guest sees no write cache and sends no flushes (writethrough, "
        f"directsync), and where a program syncs each write; which it was cannot be told",
    )


def _cached(*, raw: bool) -> Taken:
    """Return what holds for a recording of a guest that sees a write cache."""
    if raw:
        return Taken(CACHED, tuple(CacheMode))
    return Taken(
        CACHED,
        tuple(mode for mode in CacheMode if mode in CACHED),
        "it was taken below qcow2, and QEMU would have written the tables that are still in its "
        "memory with each write",
    )


_THROUGH_STATED = Taken(
    THROUGH,
    tuple(mode for mode in CacheMode if mode in THROUGH),
    "under writethrough and directsync the guest sees no write cache, and none of its flushes is "
    "in the recording",
)
_SYNCED = (
    "a flush for each write is taken for the guest's own: QEMU's writethrough would have used FUA "
    "here; if something stood between QEMU and nbdproxy (/dev/nbd0), say --recorded-as writethrough"
)
_IF_KNOWN = ", or say QEMU's cache mode of then with --recorded-as, if you know it"
_ONE_EACH = (9, 10)
_BELOW_QCOW2 = (1, 3)
"""From so many flushes to so many writes on QEMU may have sent them for the writes' sake. Their
order says less: for writes in parallel QEMU sends the flushes afterwards, in a row. Below qcow2
tables are written besides (seen: 113 flushes to 140 writes, and 2 to 4)."""


def check_projection(taken: Taken, modes: Iterable[CacheMode]) -> None:
    """Raise ProjectionError if the recording does not hold what one of `modes` would need."""
    wrong = [mode.value for mode in modes if mode in taken.left_out]
    if wrong:
        known = "" if taken.modes <= CACHED or taken.modes <= THROUGH else _IF_KNOWN
        raise ProjectionError(
            f"this recording tells nothing about {', '.join(wrong)}: {taken.why}; ask with "
            f"--mode {','.join(mode.value for mode in taken.tells)}{known}"
        )


def _flushes_to_writes(table: RequestTable, writes: Mask, flushes: int, to: int) -> bool:
    """Tell whether there are at least so many flushes to so many writes; failed ones aside."""
    good = np.equal(table.error, 0)
    good &= table.completed != NEVER
    written = int(np.count_nonzero(writes & good))
    return written > 0 and int(np.count_nonzero(table.is_flush & good)) * to >= written * flushes

"""The guest kernel's own log of what it writes: dm-log-writes between filesystem and disk.

A second witness beside nbdproxy's recording. The stack is: filesystem, dm-log-writes, the target
disk, QEMU, and whatever serves that disk; the log goes to a disk of its own, a raw file of the
host. What this needs is loaded only in guests that want it.

Guarantees: when a run is over, whatever its ending, every entry that was logged until then is in
the file, and its superblock counts it. Unmounting ends the log in order: its last entry is the mark
`dm-log-writes-end`. Any other ending leaves marks `settled`, and no writes that no flush followed:
the kernel lists a write without FUA with the next flush. (No flush is sent here to have them, for
that would make them durable.) A workload may set marks of its own:
`/tools/bin/dmsetup message log 0 mark NAME`.

Does not cover logs that outgrow `LOG_BYTES`: the kernel then logs no more, and the run fails.
Source of the target's behaviour: the kernel's Documentation, admin-guide/device-mapper/log-writes.
"""

from __future__ import annotations

from pathlib import Path

from nbdproxy.errors import LabError
from nbdproxy.lab.guest.disk import make_sparse

DISK = "/dev/dm-0"
"""What the filesystem is mounted from, as the kernel calls it; the guest has no udev."""

LOG_BYTES = 4 << 30
"""The size of the log's file, which has holes where nothing was logged."""

_DMSETUP = "/tools/bin/dmsetup"
_TRIES = 50

DETACH = (f"{_DMSETUP} remove log || fail write-log",)
"""The lines of shell that end the log in order; the disk must have been unmounted."""


def prepare(path: Path) -> None:
    """Make `path` an empty file for a log; what it held is lost. `LabError` if it cannot be."""
    if path.exists() and not path.is_file():
        raise LabError(f"{path} is not a regular file; the lab logs writes only to files")
    make_sparse(path, LOG_BYTES)


def drive(path: str) -> tuple[str, ...]:
    """Return QEMU's options for the log's disk; `path` is an option of `-drive` that names it."""
    return (
        "-drive", f"if=none,id=log,format=raw,cache=unsafe,{path}",
        "-device", "virtio-blk-pci,drive=log,addr=6",
    )  # fmt: skip


def attach(target: str, log: str) -> tuple[str, ...]:
    """Return the lines of shell that put the log between `DISK` and the target; device names."""
    return (
        "load log-writes",
        f"wait_for {target}",
        f"wait_for {log}",
        f'echo "0 $(blockdev --getsz {target}) log-writes {target} {log}" |'
        f" {_DMSETUP} create log --noudevsync --noudevrules || fail write-log",
    )


def settle(log: str) -> tuple[str, ...]:
    """Return the lines of shell that wait until the superblock counts every entry.

    The kernel writes it only behind a mark or a FUA write, and without being waited for. What is
    logged in between, by the kernel's own writeback, asks for another try.
    """
    return (
        "counted() {",
        f"  dd if={log} bs=512 count=1 iflag=direct 2> /dev/null | od -A n -t u8 -j 16 -N 8",
        "}",
        f"for try in $(seq {_TRIES}); do",
        f"  {_DMSETUP} message log 0 mark settled || fail write-log",
        "  sleep 0.1",
        f"  set -- $({_DMSETUP} status log)",
        '  [ "$6" = logging_disabled ] && fail write-log-is-full',
        "  [ $(counted) = $4 ] && break",
        f"  [ $try = {_TRIES} ] && fail write-log",
        "done",
    )

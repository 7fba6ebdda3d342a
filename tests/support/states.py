"""States of a disk as a real kernel leaves them when the power goes, made in the checker guest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.oracles.manifest import Entry, Manifest


def opened(image: Path) -> OverlayDisk:
    """An image that may be changed without changing it."""
    return OverlayDisk(FileDisk(image, read_only=True))


def files(**contents: bytes) -> Manifest:
    """The manifest of some files at the top."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    return Manifest(
        tuple(Entry(f"/{name}", digests[name], len(data)) for name, data in contents.items())
    )


def cut_off(kernel: KernelOracle, image: Path, script: str) -> OverlayDisk:
    """What is on the disk at the end of a script that runs where an image is mounted."""
    disk = opened(image)
    with kernel.mounted(kernel.place(disk, None)) as guest:
        done = guest.ask("fsck", argv=["sh", "-ec", f"cd /mnt; {script}"])
        assert done["code"] == 0, done["said"]
        for extent in guest.changed():
            disk.pwrite(extent.offset, guest.pread(extent.offset, extent.length))
    return disk

"""Disks and partitions that read all zeroes: they have no files, though no oracle opens them."""

from __future__ import annotations

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName
from nbdproxy.oracles.partitions import slices

_READ = 1 << 20


def missing_if_blank(
    findings: Findings, disk: ReadableDevice, manifest: Manifest, mount: Mount
) -> Findings:
    """Return the findings; all files missing, if there are none and disk or partition is blank."""
    cannot_tell = findings.verdict is Verdict.UNKNOWN and not findings.conditions
    if not cannot_tell:
        return findings
    why = what_is_blank(disk, mount.partition)
    if why is None:
        return findings
    missing = dict.fromkeys(manifest.paths(), Condition.MISSING)
    return Findings(Verdict.FAIL, missing, why)


def what_is_blank(disk: ReadableDevice, partition: PartitionName) -> str | None:
    """Say that a disk, or a partition that it has, reads all zeroes; None if neither does."""
    what = "the disk" if is_blank(disk) else _blank_part(disk, partition)
    return None if what is None else f"{what} reads all zeroes"


def _blank_part(disk: ReadableDevice, partition: PartitionName) -> str | None:
    """Return what a partition is called if it reads all zeroes."""
    try:
        part = next((part for part in slices(disk) if partition in {part.number, part.key}), None)
    except FilesystemError:
        return None
    return part.name if part is not None and is_blank(part.device) else None


def is_blank(device: ReadableDevice) -> bool:
    """Tell whether a disk reads all zeroes; reads up to the first byte that is not."""
    for extent in device.data_extents(0, device.size):
        for at in range(extent.offset, extent.end, _READ):
            data = device.pread(at, min(_READ, extent.end - at))
            if data.count(0) != len(data):
                return False
    return True

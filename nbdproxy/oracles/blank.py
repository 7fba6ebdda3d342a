"""A disk that reads all zeroes: no oracle can read it, and yet what is on it is certain."""

from __future__ import annotations

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Manifest

_READ = 1 << 20


def certain(findings: Findings, disk: ReadableDevice, manifest: Manifest) -> Findings:
    """Return findings, or what is certain where nothing could be told: a blank disk has no file."""
    cannot_tell = findings.verdict is Verdict.UNKNOWN and not findings.conditions
    if cannot_tell and is_blank(disk):
        missing = {entry.path: Condition.MISSING for entry in manifest.entries}
        return Findings(Verdict.FAIL, missing, "the disk reads all zeroes")
    return findings


def is_blank(device: ReadableDevice) -> bool:
    """Tell whether a disk reads all zeroes; reads up to the first byte that is not."""
    for extent in device.data_extents(0, device.size):
        for at in range(extent.offset, extent.end, _READ):
            if any(device.pread(at, min(_READ, extent.end - at))):
                return False
    return True

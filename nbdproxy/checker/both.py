"""`BothOracles`: the quick oracle and the kernel on every state, and where they differ.

The kernel's word counts where it has one. That the quick oracle cannot tell is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent
from nbdproxy.lab.cache import silent
from nbdproxy.oracles.browse import Shown
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Examination
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName
from nbdproxy.oracles.oracle import Digests, Follower
from nbdproxy.oracles.quick import QUICK
from nbdproxy.oracles.watched import Reads


class Difference(NamedTuple):
    """One file of one state, on which the two do not agree."""

    state: str
    path: str
    quick: Condition
    kernel: Condition


class BothOracles:
    """Satisfies `Oracle`.

    A `strict` one calls a state unknown on which the two differ, and says where.

    state        what the caller calls the state that it is about to ask of
    compared     how many states both could judge
    differences  what they said differently
    """

    def __init__(self, progress: Callable[[str], None] = silent, *, strict: bool = False) -> None:
        self.strict = strict
        self.state = ""
        self.compared = 0
        self.differences: list[Difference] = []
        self._kernel = KernelOracle(progress)

    def follow(self, manifest: Manifest, *, earlier: Digests, mount: Mount) -> Follower:
        """Return what judges the files of a manifest, absolute paths that a mount has."""
        return Pair(
            self,
            QUICK.follow(manifest, earlier=earlier, mount=mount),
            self._kernel.follow(manifest, earlier=earlier, mount=mount),
        )

    def roots(self, device: ReadableDevice, partition: PartitionName) -> tuple[str, ...]:
        """Return the directories that a mount of a filesystem may show at its point."""
        return self._kernel.roots(device, partition)

    def paths(self, device: ReadableDevice, *, mount: Mount) -> list[str]:
        """Return the paths of a mount's files and links."""
        return self._kernel.paths(device, mount=mount)

    def scan(
        self, device: ReadableDevice, under: str, *, mount: Mount, modes: bool = False
    ) -> Manifest:
        """Describe a mount's files below a directory."""
        return self._kernel.scan(device, under, mount=mount, modes=modes)

    def content(self, device: ReadableDevice, entry: Entry, *, mount: Mount) -> bytes | None:
        """Return what a file holds, or where a symbolic link points; None if none is there."""
        return self._kernel.content(device, entry, mount=mount)

    def browse(self, device: ReadableDevice, *, mount: Mount) -> AbstractContextManager[Shown]:
        """Open a mount to go through its files, as the kernel reads them."""
        return self._kernel.browse(device, mount=mount)

    def examine(
        self, device: ReadableDevice, *, partition: PartitionName, fsck: bool = True
    ) -> Examination:
        """Tell of the filesystem as a whole."""
        return self._kernel.examine(device, partition=partition, fsck=fsck)

    def note(self, quick: Findings, kernel: Findings) -> None:
        """Compare what the two say of a state."""
        if not quick.conditions or not kernel.conditions:
            return
        self.compared += 1
        for path, condition in kernel.conditions.items():
            said = quick.conditions[path]
            if said is not condition and Condition.CANNOT_BE_TOLD not in {said, condition}:
                self.differences.append(Difference(self.state, path, said, condition))

    def close(self) -> None:
        """End the guest."""
        self._kernel.close()


class Pair:
    """Judges each state twice."""

    def __init__(self, both: BothOracles, quick: Follower, kernel: Follower) -> None:
        self._both = both
        self._quick = quick
        self._kernel = kernel

    @property
    def reads(self) -> Reads | None:
        """What either read; None if one cannot tell."""
        quick, kernel = self._quick.reads, self._kernel.reads
        if quick is None or kernel is None:
            return None
        return Reads((*quick.ranges(), *kernel.ranges()))

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file on `device`."""
        changed = None if changed is None else list(changed)
        quick = self._quick.check(device, changed)
        kernel = self._kernel.check(device, changed)
        known = len(self._both.differences)
        self._both.note(quick, kernel)
        if self._both.strict and len(self._both.differences) > known:
            one = self._both.differences[known]
            reason = f"the kernel finds {one.path} {one.kernel}, the quick oracle {one.quick}"
            return Findings(Verdict.UNKNOWN, kernel.conditions, reason)
        if kernel.verdict is not Verdict.UNKNOWN or kernel.conditions:
            return kernel
        if quick.verdict is not Verdict.PASS:
            return quick
        reason = f"the kernel could not tell, the quick oracle alone says whole: {kernel.reason}"
        return Findings(Verdict.UNKNOWN, quick.conditions, reason)

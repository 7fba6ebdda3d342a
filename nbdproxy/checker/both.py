"""`BothOracles`: the quick oracle and the kernel on every state, and where they differ.

A file that only one of them calls whole cannot be told; nor can a file that only the quick oracle
could judge, as the kernel is what it is compared with. That the quick oracle cannot tell is no
difference: the kernel's condition counts then, and also where both call a file lost in different
words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent
from nbdproxy.lab.guest.cache import silent
from nbdproxy.oracles.browse import MountBrowser
from nbdproxy.oracles.check import FileCheck, Findings, Verdict, merge
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Examination
from nbdproxy.oracles.globs import Matcher, no_file
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName
from nbdproxy.oracles.oracle import EarlierDigests, ManifestCheck
from nbdproxy.oracles.quick import QUICK
from nbdproxy.oracles.watched import RangeSet


class Difference(NamedTuple):
    """One file of one state for which the two have different conditions."""

    state: str
    path: str
    quick: Condition
    kernel: Condition


class BothOracles:
    """An `Oracle`.

    state        the name of the next state, set by the caller, for `differences`
    compared     how many states both could judge
    differences  where their conditions differ
    """

    def __init__(self, progress: Callable[[str], None] = silent) -> None:
        self.state = ""
        self.compared = 0
        self.differences: list[Difference] = []
        self._kernel = KernelOracle(progress)

    def prepare_check(
        self, manifest: Manifest, *, earlier: EarlierDigests, mount: Mount
    ) -> ManifestCheck:
        """Return the check of a manifest's files; its paths are absolute, all on one mount."""
        return BothChecks(
            self,
            QUICK.prepare_check(manifest, earlier=earlier, mount=mount),
            self._kernel.prepare_check(manifest, earlier=earlier, mount=mount),
        )

    def roots(self, device: ReadableDevice, partition: PartitionName) -> tuple[str, ...]:
        """Return the directories that a mount of a filesystem may show at its point."""
        return self._kernel.roots(device, partition)

    def paths(self, device: ReadableDevice, *, mount: Mount) -> list[str]:
        """Return the paths of a mount's files and links."""
        return self._kernel.paths(device, mount=mount)

    def scan(
        self,
        device: ReadableDevice,
        under: str,
        *,
        mount: Mount,
        modes: bool = False,
        without: Matcher = no_file,
    ) -> Manifest:
        """Describe a mount's files below a directory."""
        return self._kernel.scan(device, under, mount=mount, modes=modes, without=without)

    def content(self, device: ReadableDevice, entry: Entry, *, mount: Mount) -> bytes | None:
        """Return what a file holds, or where a symbolic link points; None if none is there."""
        return self._kernel.content(device, entry, mount=mount)

    def browse(
        self, device: ReadableDevice, *, mount: Mount
    ) -> AbstractContextManager[MountBrowser]:
        """Open a mount to go through its files, as the kernel reads them."""
        return self._kernel.browse(device, mount=mount)

    def examine(
        self, device: ReadableDevice, *, partition: PartitionName, fsck: bool = True
    ) -> Examination:
        """Tell of the filesystem as a whole."""
        return self._kernel.examine(device, partition=partition, fsck=fsck)

    def note(self, quick: Findings, kernel: Findings) -> list[Difference]:
        """Compare the findings on a state, enter and return the differences."""
        if not quick.conditions or not kernel.conditions:
            return []
        self.compared += 1
        found = [
            Difference(self.state, path, said, condition)
            for path, condition in kernel.conditions.items()
            if (said := quick.conditions[path]) is not condition
            and Condition.CANNOT_BE_TOLD not in {said, condition}
        ]
        self.differences += found
        return found

    def close(self) -> None:
        """End the guest."""
        self._kernel.close()


class BothChecks:
    """A `ManifestCheck` that judges each state by both oracles."""

    def __init__(self, both: BothOracles, quick: ManifestCheck, kernel: ManifestCheck) -> None:
        self._both = both
        self._quick = quick
        self._kernel = kernel

    @property
    def reads(self) -> RangeSet | None:
        """The bytes that either read; None if that is not known of one."""
        quick, kernel = self._quick.reads, self._kernel.reads
        if quick is None or kernel is None:
            return None
        return RangeSet((*quick.ranges(), *kernel.ranges()))

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file on `device`."""
        changed = None if changed is None else list(changed)
        quick = self._quick.check(device, changed)
        kernel = self._kernel.check(device, changed)
        return agreed(quick, kernel, self._both.note(quick, kernel))


def agreed(quick: Findings, kernel: Findings, differences: Sequence[Difference]) -> Findings:
    """Return the kernel's findings, where the quick oracle does not contradict them."""
    if not differences and (kernel.conditions or not quick.conditions):
        return kernel
    if not kernel.conditions:
        counts = Counter(condition.value for condition in quick.conditions.values())
        said = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
        reason = f"the kernel could not tell, the quick oracle alone says {said}: {kernel.reason}"
        unknown = dict.fromkeys(quick.conditions, Condition.CANNOT_BE_TOLD)
        return Findings(Verdict.UNKNOWN, unknown, reason)
    conditions = dict(kernel.conditions)
    for one in differences:
        if Condition.WHOLE in {one.quick, one.kernel}:
            conditions[one.path] = Condition.CANNOT_BE_TOLD
    one = differences[0]
    reasons = [
        f"the kernel finds {one.path} {one.kernel.value}, the quick oracle {one.quick.value}"
    ]
    reasons += [f"they differ on {len(differences) - 1:,} more"] if len(differences) > 1 else []
    reasons += [kernel.reason] if kernel.reason else []
    verdict = merge({FileCheck(condition).verdict for condition in conditions.values()})
    return Findings(verdict, conditions, "; ".join(reasons))

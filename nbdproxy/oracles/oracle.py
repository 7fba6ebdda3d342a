"""What an oracle is: it says what became of files, and of their filesystem, in any state of a disk.

There are two: `quick`, which reads without a kernel and says *unknown* where it would have to
guess, and the kernel itself (`nbdproxy.checker`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Findings
from nbdproxy.oracles.examine import Examination
from nbdproxy.oracles.manifest import Entry, Manifest

CONTENT_MAX = 64 << 20
"""So many bytes of a file a guest hands out at once."""

Digests = Mapping[str, Collection[str]]
"""Of each path the SHA-256 digests that the file had earlier."""


class Follower(Protocol):
    """Judges the same files in one state after the other."""

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file; `changed` as in `IncrementalCheck.check`."""
        ...

    @property
    def reads(self) -> Iterable[Extent] | None:
        """What of the disk the last findings depend on; None if that cannot be told."""
        ...


class Oracle(Protocol):
    """Knows filesystems."""

    def follow(self, manifest: Manifest, *, earlier: Digests, partition: int | None) -> Follower:
        """Return what judges the files of a manifest with absolute paths."""
        ...

    def locate(
        self, device: ReadableDevice, manifest: Manifest, *, partition: int | None = None
    ) -> tuple[int, Manifest]:
        """Return the partition that a manifest describes, and the manifest with its paths."""
        ...

    def scan(
        self, device: ReadableDevice, under: str, *, partition: int | None, modes: bool = False
    ) -> Manifest:
        """Describe all files below a directory, with `modes` if wanted and kept there."""
        ...

    def content(
        self, device: ReadableDevice, entry: Entry, *, partition: int | None
    ) -> bytes | None:
        """Return what a file holds, or where a symbolic link points; None if none is there.

        None also if it cannot be read. A guest hands out no more than CONTENT_MAX.
        """
        ...

    def examine(
        self, device: ReadableDevice, *, partition: int | None, fsck: bool = True
    ) -> Examination:
        """Tell of the filesystem as a whole; without `fsck` that is not run."""
        ...

    def close(self) -> None:
        """Release what it holds; closing twice is harmless."""
        ...

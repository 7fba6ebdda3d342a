"""What an oracle is: it says what became of files, and of their filesystem, in any state of a disk.

There are two: `quick`, which reads without a kernel and says *unknown* where it would have to
guess, and the kernel itself (`nbdproxy.checker`). Each knows one filesystem at a time, at its place
in the guest's tree; `composite` asks for all of a tree. All paths are the guest's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.extents import Extent
from nbdproxy.oracles.browse import MountBrowser
from nbdproxy.oracles.check import Findings
from nbdproxy.oracles.examine import Examination
from nbdproxy.oracles.globs import Matcher, no_file
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName
from nbdproxy.oracles.watched import RangeSet

CONTENT_MAX = 64 << 20
"""So many bytes of a file a guest hands out at once."""

EarlierDigests = Mapping[str, Collection[str]]
"""Of each path the SHA-256 digests that the file had earlier."""


class ManifestCheck(Protocol):
    """Judges the same files in one state after the other."""

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file; `changed` as in `IncrementalCheck.check`."""
        ...

    @property
    def reads(self) -> RangeSet | None:
        """What of the disk the last findings depend on; None if that cannot be told."""
        ...


class Oracle(Protocol):
    """Knows filesystems.

    A link or `..` that leads out of a mount, into another filesystem, leaves its file
    *cannot-be-told*; an absolute link that leads into the mount is followed from its point.
    """

    def prepare_check(
        self, manifest: Manifest, *, earlier: EarlierDigests, mount: Mount
    ) -> ManifestCheck:
        """Return what judges the files of a manifest, absolute paths that a mount has."""
        ...

    def roots(self, device: ReadableDevice, partition: PartitionName) -> tuple[str, ...]:
        """Return the directories that a mount of a filesystem may show at its point.

        The one that a mount without options shows comes first. Of Btrfs those are the subvolumes,
        by their paths from the top level; of all others the top is the only one.
        """
        ...

    def paths(self, device: ReadableDevice, *, mount: Mount) -> list[str]:
        """Return the paths of a mount's files and links; raises FilesystemError as `scan` does."""
        ...

    def scan(
        self,
        device: ReadableDevice,
        under: str,
        *,
        mount: Mount,
        modes: bool = False,
        without: Matcher = no_file,
    ) -> Manifest:
        """Describe a mount's files below a directory, with `modes` if wanted and kept there.

        Files of the paths that `without` means are not read.
        """
        ...

    def content(self, device: ReadableDevice, entry: Entry, *, mount: Mount) -> bytes | None:
        """Return what a file holds, or where a symbolic link points; None if none is there.

        None also if it cannot be read. A guest hands out no more than CONTENT_MAX.
        """
        ...

    def browse(
        self, device: ReadableDevice, *, mount: Mount
    ) -> AbstractContextManager[MountBrowser]:
        """Open a mount to go through its files.

        Raises NotMountedError if a kernel would not mount it, other FilesystemErrors if that cannot
        be told or a guest failed.
        """
        ...

    def examine(
        self, device: ReadableDevice, *, partition: PartitionName, fsck: bool = True
    ) -> Examination:
        """Tell of a filesystem as a whole; without `fsck` that is not run."""
        ...

    def close(self) -> None:
        """Release what it holds; closing twice is harmless."""
        ...

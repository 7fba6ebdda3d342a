"""`Oracle`: the interface of what judges files and filesystems in any state of a disk.

There are two: `quick`, which reads without a kernel and says *unknown* where a kernel's answer is
not certain, and the kernel itself (`nbdproxy.checker`). Each call is about one filesystem, at its
mount point in the guest's tree; `composite` covers a whole tree. All paths are the guest's.
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
"""Bytes of a file that `Oracle.content` returns at most."""

EarlierDigests = Mapping[str, Collection[str]]
"""By path, the SHA-256 digests in hex of a file's earlier versions."""


class ManifestCheck(Protocol):
    """The check of one manifest's files, repeated for one state after the other."""

    def check(self, device: ReadableDevice, changed: Iterable[Extent] | None) -> Findings:
        """Tell the condition of every file; `changed` as in `IncrementalCheck.check`."""
        ...

    @property
    def reads(self) -> RangeSet | None:
        """The bytes of the disk that the last findings depend on; None if that is not known."""
        ...


class Oracle(Protocol):
    """Judges files and filesystems.

    A symbolic link or `..` that leads out of a mount, into another filesystem, makes its file
    *cannot-be-told*; an absolute link that leads into the mount is followed from its point.
    """

    def prepare_check(
        self, manifest: Manifest, *, earlier: EarlierDigests, mount: Mount
    ) -> ManifestCheck:
        """Return the check of a manifest's files; its paths are absolute, all on one mount."""
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
        """Return a manifest of a mount's files below a directory.

        `modes` adds permissions, where the filesystem keeps them. Paths that `without` matches are
        left out.
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
        """Open a mount, to walk through its directories.

        Raises NotMountedError if a kernel would not mount it, other FilesystemErrors if that cannot
        be told or a guest failed.
        """
        ...

    def examine(
        self, device: ReadableDevice, *, partition: PartitionName, fsck: bool = True
    ) -> Examination:
        """Examine a filesystem as a whole; its checker is run only with `fsck`."""
        ...

    def close(self) -> None:
        """Release what it holds; closing twice is harmless."""
        ...

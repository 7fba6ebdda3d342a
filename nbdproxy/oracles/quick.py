"""`QUICK`: the oracle that needs no kernel and no root, and takes milliseconds for a state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles import check
from nbdproxy.oracles.browse import ExtBrowser
from nbdproxy.oracles.examine import Examination
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.filesystems import FilesystemKind, kind_of, open_filesystem
from nbdproxy.oracles.fsck import e2fsck
from nbdproxy.oracles.globs import Matcher, no_file
from nbdproxy.oracles.incremental_check import IncrementalCheck
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Mount, PartitionName
from nbdproxy.oracles.oracle import CONTENT_MAX, EarlierDigests
from nbdproxy.oracles.partitions import Slice

_NOT_RUN = "it is run for the ext family only; ask with --oracle kernel"


class QuickOracle:
    """An `Oracle`; keeps nothing between calls."""

    def prepare_check(
        self, manifest: Manifest, *, earlier: EarlierDigests, mount: Mount
    ) -> IncrementalCheck:
        """Return the check of a manifest's files; its paths are absolute, all on one mount."""
        return IncrementalCheck(manifest, earlier=earlier, mount=mount)

    def roots(
        self,
        device: ReadableDevice,  # noqa: ARG002
        partition: PartitionName,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Return the top: what is read here has no subvolumes."""
        return ("/",)

    def paths(self, device: ReadableDevice, *, mount: Mount) -> list[str]:
        """Return the paths of a mount's files and links."""
        return check.paths(device, mount=mount)

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
        return check.scan(device, under, mount=mount, modes=modes, without=without)

    def content(self, device: ReadableDevice, entry: Entry, *, mount: Mount) -> bytes | None:
        """Return what a file holds, or where a symbolic link points; None if none is there."""
        try:
            filesystem = check.opened(device, mount)
            node = filesystem.lookup(check.absolute(entry.path), follow_last=entry.target is None)
            if node is None:
                return None
            if node.is_symlink:
                return filesystem.symlink_target(node)
            if not node.is_regular or node.size > max(device.size, CONTENT_MAX):
                return None
            return b"".join(filesystem.chunks(node))
        except FilesystemError:
            return None

    @contextmanager
    def browse(self, device: ReadableDevice, *, mount: Mount) -> Iterator[ExtBrowser]:
        """Open a mount, to walk through its directories."""
        yield ExtBrowser(device, mount)

    def examine(
        self, device: ReadableDevice, *, partition: PartitionName, fsck: bool = True
    ) -> Examination:
        """Tell whether it mounts, what the journal changes, and what fsck says of a copy.

        Whatever a kernel alone can tell is None.
        """
        try:
            place = check.only(check.candidates(device, partition))
        except FilesystemError as error:
            return Examination(None, str(error), (), "there is nothing to check")
        is_ext = kind_of(place.device) is FilesystemKind.EXT
        said = "it was not asked for" if not fsck else e2fsck(place.device) if is_ext else _NOT_RUN
        try:
            open_filesystem(place.device)
        except FilesystemError as error:
            return Examination(None, str(error), (), said)
        return Examination(True, None, _replayed(place) if is_ext else (), said)

    def close(self) -> None:
        """Do nothing: it holds nothing."""


QUICK = QuickOracle()


def _replayed(place: Slice) -> tuple[Extent, ...]:
    """Return where the journal's blocks differ from what is on the disk, in bytes of the disk."""
    filesystem = Filesystem(place.device)
    size = filesystem.superblock.block_size
    found = ExtentSet()
    for number, block in journal.replay(filesystem).items():
        if place.device.pread(number * size, size) != block:
            for extent in place.on_disk(number * size, size):
                found.add(extent.offset, extent.end)
    return tuple(found)

"""The one way in: a device as the kernel would show it right after a mount."""

from __future__ import annotations

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.faults import CorruptError, refusal
from nbdproxy.oracles.ext4.filesystem import ROOT, Filesystem
from nbdproxy.oracles.ext4.replayed import ReplayedDevice
from nbdproxy.oracles.mounts import ONLY, Mount


def open_filesystem(device: ReadableDevice, mount: Mount = ONLY) -> Filesystem:
    """Return the filesystem that a mount of `device` would show, at its place.

    Raises NoFilesystemError, or RefusedError with the reason if only a kernel can tell.
    """
    filesystem = Filesystem(device, mount)
    blocks = journal.replay(filesystem)
    if blocks:
        shown = ReplayedDevice(device, filesystem.superblock.block_size, blocks)
        filesystem = Filesystem(shown, mount)
    check_root(filesystem)
    return filesystem


def check_root(filesystem: Filesystem) -> None:
    """Raise RefusedError unless the filesystem, journal replayed, has a root to mount."""
    try:
        root = filesystem.inode(ROOT)
    except CorruptError as error:
        raise refusal(f"its root directory cannot be read: {error}") from error
    if not root.is_directory or not root.size:
        raise refusal("its root is not a directory")

"""`Remount`: the mount of a disk that changes from state to state, with as little work as possible.

Three stages, each with what it read: *where* the filesystem is (partitions), the *log* (superblock,
descriptors and journal as they are on the disk), and the *top* of the mounted view (superblock,
descriptors and root with the journal laid over). A stage is done again if something it read has
changed. What then differs in the view are the blocks that changed on the disk and are not in the
journal, and those for which the journal has something else than before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import runs
from nbdproxy.oracles.check import candidates
from nbdproxy.oracles.ext4 import journal
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.mounted import check_mount
from nbdproxy.oracles.ext4.replayed import ReplayedDevice
from nbdproxy.oracles.ext4.superblock import Incompat, Superblock
from nbdproxy.oracles.filesystems import FilesystemKind, kind_of
from nbdproxy.oracles.mounts import PartitionName
from nbdproxy.oracles.partitions import SliceDevice
from nbdproxy.oracles.watched import NOTHING, ReadRange, Reads, WatchedDevice

WHERE, LOG, TOP = 1, 2, 3
"""The stages, by the order in which they are reached."""


class SeveralError(Exception):
    """Not followed from state to state: several filesystems, another than ext, or in pieces."""


class Remount:
    """The only filesystem of a disk; `view` is its part of the disk with the journal replayed.

    Every part of `view` that is read is noted there; the next state's view is the same object.
    """

    def __init__(self, partition: PartitionName) -> None:
        self._partition = partition
        self._is_done = False
        self._reached = WHERE
        self._where = NOTHING
        self._place: ReadRange | None = None
        nothing = MemoryDisk(0)
        self._low = WatchedDevice(nothing, keeps=True)
        self._log = NOTHING
        self._checksums: journal.ChecksumCache = {}
        self._replayed = ReplayedDevice(nothing, 1, {})
        self.view = WatchedDevice(self._replayed)
        self._shown: Mapping[int, bytes] = {}
        self._top: set[int] = set()
        self._core: tuple[Superblock, list[int]] | None = None

    def update(
        self, device: ReadableDevice, changed: Reads, known: Collection[int]
    ) -> set[int] | None:
        """Go on to the next state, which may differ from the last in the bytes `changed`.

        Returns which of the `known` blocks may differ in the view, or None if nothing that was
        read from the old view holds in this one. Raises FilesystemError as `open_filesystem` does,
        and SeveralError. After an error, give `changed` again together with what changed since.
        """
        was_done, self._is_done = self._is_done, False
        self._reached = WHERE
        if not was_done or not changed.isdisjoint(self._where):
            before = self._place
            self._locate(device)
            was_done = was_done and self._place == before  # nothing holds in another place
        assert self._place is not None
        start, end = self._place
        is_whole = (start, end) == (0, device.size)
        part = device if is_whole else SliceDevice(device, start, end - start)
        local = changed.moved(-start, end - start)
        self._reached = LOG
        self._low.base = part
        self._low.forget(local)
        if not was_done or not local.isdisjoint(self._log):
            size = self._replayed.block_size
            self._replay()
            was_done = was_done and self._replayed.block_size == size  # blocks are counted anew
        self._reached = TOP
        self._replayed = self._replayed.over(part)
        self.view.base = self._replayed
        moved = self._in_place(local, known) | _differing(self._shown, self._replayed.blocks)
        is_same = True
        if not was_done or not moved.isdisjoint(self._top):
            is_same = self._look_at_top()
        self._shown = self._replayed.blocks
        self._is_done = True
        return moved if is_same else None

    def reads(self, blocks: Iterable[int] = ()) -> Reads:
        """Return what the stages reached by the last `update` read, and `blocks` of the view."""
        found = self._where.ranges()
        if self._reached == WHERE:
            return Reads(found)
        assert self._place is not None
        start = self._place[0]
        found += [(start + low, start + high) for low, high in self._log.ranges()]
        if self._reached == TOP:
            size = self._replayed.block_size
            seen = (self._top | set(blocks)).difference(self._replayed.blocks)
            found += [(start + low * size, start + high * size) for low, high in runs(seen)]
        return Reads(found)

    def touched(self, changed: Reads, known: Collection[int]) -> bool:
        """Tell whether `changed` meets what `reads(known)` would return; only after `update`."""
        if self._place is None or not changed.isdisjoint(self._where):
            return True
        start, end = self._place
        local = changed.moved(-start, end - start)
        return not local.isdisjoint(self._log) or bool(self._in_place(local, known))

    def _locate(self, device: ReadableDevice) -> None:
        """Do the first stage; what was read of another place is of no use."""
        disk = WatchedDevice(device)
        try:
            found = candidates(disk, self._partition)
        finally:
            self._where = Reads(disk.take())
        is_ext = kind_of(found[0].device) in {None, FilesystemKind.EXT}
        if len(found) > 1 or not is_ext or not found[0].is_direct:
            raise SeveralError
        place = (found[0].offset, found[0].offset + found[0].length)
        if place != self._place:
            self._place = place
            self._low = WatchedDevice(device, keeps=True)
            self._checksums, self._shown, self._core = {}, {}, None

    def _replay(self) -> None:
        """Do the second stage."""
        self._low.take()
        try:
            filesystem = Filesystem(self._low)
            blocks = journal.replay(filesystem, self._checksums)
        finally:
            self._log = Reads(self._low.take())
        size = filesystem.superblock.block_size
        self._replayed = ReplayedDevice(self._low.base, size, blocks)

    def _look_at_top(self) -> bool:
        """Do the third stage; tell whether the filesystem has the same shape as before."""
        size = self._replayed.block_size
        self.view.take()
        try:
            filesystem = Filesystem(self.view)
            check_mount(filesystem)
        finally:
            read = self.view.take()
            self._top = {at for low, high in read for at in range(low // size, -(-high // size))}
        sb = filesystem.superblock
        if sb.block_size != size:
            raise SeveralError  # the journal replaced the superblock by one of another filesystem
        # That the journal was replayed changes one flag, which matters to nobody after the mount.
        core = (replace(sb, incompat=sb.incompat & ~Incompat.RECOVER), filesystem.tables)
        is_same, self._core = core == self._core, core
        return is_same

    def _in_place(self, local: Reads, known: Collection[int]) -> set[int]:
        """Return which blocks that matter changed on the disk and are not in the journal."""
        size = self._replayed.block_size
        replayed = self._replayed.blocks
        numbers = [(low // size, -(-high // size)) for low, high in local.ranges()]
        if sum(high - low for low, high in numbers) <= len(known) + len(self._top):
            found = {
                block
                for low, high in numbers
                for block in range(low, high)
                if block in known or block in self._top
            }
        else:
            found = {
                block
                for block in (*known, *self._top)
                if local.meets(block * size, (block + 1) * size)
            }
        return found.difference(replayed) if replayed else found


def _differing(before: Mapping[int, bytes], now: Mapping[int, bytes]) -> set[int]:
    """Return the blocks that the journal no longer has, has now, or has with another content."""
    if before is now:
        return set()
    found = {block for block, data in now.items() if before.get(block) != data}
    return found.union(before.keys() - now.keys())

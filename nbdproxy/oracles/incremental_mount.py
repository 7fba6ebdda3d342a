"""`IncrementalMount`: the mounted view of a disk, updated from one state to the next.

Three stages, each with the bytes that it read: PARTITION (where the filesystem is), JOURNAL
(superblock, descriptors and log as they are on the disk) and VIEW (superblock, descriptors and root
directory with the journal replayed). A stage is done again if bytes that it read have changed.
Blocks of the view differ from the last state's where they changed on the disk and are not in the
journal, and where the journal has another content for them than before.
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
from nbdproxy.oracles.watched import NOTHING, RangeSet, ReadRange, WatchedDevice

PARTITION, JOURNAL, VIEW = 1, 2, 3
"""The stages, in the order in which they are done."""


class NotIncrementalError(Exception):
    """No updates in place for this disk: several filesystems, not ext, or not in one range."""


class IncrementalMount:
    """The only filesystem of a disk; `view` is its range of the disk with the journal replayed.

    `view` is a `WatchedDevice`, and stays the same object for all states.
    """

    def __init__(self, partition: PartitionName) -> None:
        self._partition = partition
        self._is_current = False
        self._reached = PARTITION
        self._partition_reads = NOTHING
        self._range: ReadRange | None = None
        nothing = MemoryDisk(0)
        self._disk = WatchedDevice(nothing, keeps=True)
        self._journal_reads = NOTHING
        self._checksums: journal.ChecksumCache = {}
        self._replayed = ReplayedDevice(nothing, 1, {})
        self.view = WatchedDevice(self._replayed)
        self._replayed_before: Mapping[int, bytes] = {}
        self._view_blocks: set[int] = set()
        self._geometry: tuple[Superblock, list[int]] | None = None

    def update(
        self, device: ReadableDevice, changed: RangeSet, known: Collection[int]
    ) -> set[int] | None:
        """Change to another state, which may differ from the last one in the bytes `changed`.

        Returns which of the `known` blocks may differ in the view; None if all may. Raises
        FilesystemError as `open_filesystem` does, and NotIncrementalError. After an error the next
        call needs these changes as well as the new ones.
        """
        was_current, self._is_current = self._is_current, False
        self._reached = PARTITION
        if not was_current or not changed.isdisjoint(self._partition_reads):
            before = self._range
            self._locate(device)
            was_current = was_current and self._range == before  # nothing holds in another place
        assert self._range is not None
        start, end = self._range
        is_whole = (start, end) == (0, device.size)
        part = device if is_whole else SliceDevice(device, start, end - start)
        local = changed.moved(-start, end - start)
        self._reached = JOURNAL
        self._disk.base = part
        self._disk.forget(local)
        if not was_current or not local.isdisjoint(self._journal_reads):
            size = self._replayed.block_size
            self._replay()
            was_current = (
                was_current and self._replayed.block_size == size
            )  # blocks are counted anew
        self._reached = VIEW
        self._replayed = self._replayed.over(part)
        self.view.base = self._replayed
        differing = self._changed_in_place(local, known) | _differing(
            self._replayed_before, self._replayed.blocks
        )
        is_same = True
        if not was_current or not differing.isdisjoint(self._view_blocks):
            is_same = self._read_view()
        self._replayed_before = self._replayed.blocks
        self._is_current = True
        return differing if is_same else None

    def reads(self, blocks: Iterable[int] = ()) -> RangeSet:
        """Return the bytes of the disk that the last `update` read, and `blocks` of the view."""
        found = self._partition_reads.ranges()
        if self._reached == PARTITION:
            return RangeSet(found)
        assert self._range is not None
        start = self._range[0]
        found += [(start + low, start + high) for low, high in self._journal_reads.ranges()]
        if self._reached == VIEW:
            size = self._replayed.block_size
            seen = (self._view_blocks | set(blocks)).difference(self._replayed.blocks)
            found += [(start + low * size, start + high * size) for low, high in runs(seen)]
        return RangeSet(found)

    def touched(self, changed: RangeSet, known: Collection[int]) -> bool:
        """Tell whether `changed` overlaps what `reads(known)` returns; only after `update`."""
        if self._range is None or not changed.isdisjoint(self._partition_reads):
            return True
        start, end = self._range
        local = changed.moved(-start, end - start)
        return not local.isdisjoint(self._journal_reads) or bool(
            self._changed_in_place(local, known)
        )

    def _locate(self, device: ReadableDevice) -> None:
        """Do the stage PARTITION; forget everything if the filesystem is in another range."""
        disk = WatchedDevice(device)
        try:
            found = candidates(disk, self._partition)
        finally:
            self._partition_reads = RangeSet(disk.take())
        is_ext = kind_of(found[0].device) in {None, FilesystemKind.EXT}
        if len(found) > 1 or not is_ext or not found[0].is_direct:
            raise NotIncrementalError
        place = (found[0].offset, found[0].offset + found[0].length)
        if place != self._range:
            self._range = place
            self._disk = WatchedDevice(device, keeps=True)
            self._checksums, self._replayed_before, self._geometry = {}, {}, None

    def _replay(self) -> None:
        """Do the stage JOURNAL."""
        self._disk.take()
        try:
            filesystem = Filesystem(self._disk)
            blocks = journal.replay(filesystem, self._checksums)
        finally:
            self._journal_reads = RangeSet(self._disk.take())
        size = filesystem.superblock.block_size
        self._replayed = ReplayedDevice(self._disk.base, size, blocks)

    def _read_view(self) -> bool:
        """Do the stage VIEW; tell whether superblock and inode tables are the same as before."""
        size = self._replayed.block_size
        self.view.take()
        try:
            filesystem = Filesystem(self.view)
            check_mount(filesystem)
        finally:
            read = self.view.take()
            self._view_blocks = {
                at for low, high in read for at in range(low // size, -(-high // size))
            }
        sb = filesystem.superblock
        if sb.block_size != size:
            raise NotIncrementalError  # the journal replaced the superblock by another one
        # Only the mount looks at the flag that says whether the journal has to be replayed.
        geometry = (replace(sb, incompat=sb.incompat & ~Incompat.RECOVER), filesystem.tables)
        is_same, self._geometry = geometry == self._geometry, geometry
        return is_same

    def _changed_in_place(self, local: RangeSet, known: Collection[int]) -> set[int]:
        """Return the blocks, of `known` and of VIEW, that changed and are not in the journal."""
        size = self._replayed.block_size
        replayed = self._replayed.blocks
        numbers = [(low // size, -(-high // size)) for low, high in local.ranges()]
        if sum(high - low for low, high in numbers) <= len(known) + len(self._view_blocks):
            found = {
                block
                for low, high in numbers
                for block in range(low, high)
                if block in known or block in self._view_blocks
            }
        else:
            found = {
                block
                for block in (*known, *self._view_blocks)
                if local.meets(block * size, (block + 1) * size)
            }
        return found.difference(replayed) if replayed else found


def _differing(before: Mapping[int, bytes], now: Mapping[int, bytes]) -> set[int]:
    """Return the blocks that the journal no longer has, has now, or has with another content."""
    if before is now:
        return set()
    found = {block for block, data in now.items() if before.get(block) != data}
    return found.union(before.keys() - now.keys())

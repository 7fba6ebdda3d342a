"""Files below qcow2 whose data was sent, and whose way to it was not: the entry in an L2 table.

QEMU keeps qcow2's tables in its memory until a flush. Data that was written into a new cluster
then stands in the file, and no entry leads to it: the guest reads zeroes. That is proved by
content: with such clusters in the holes of the file, it has the digest that the manifest says.

Guarantees: a file is never said to be the guest's loss if its way, or its data, leads through a
hole of the qcow2 file while something was written that nothing leads to: that cannot be told.
Not covered: a file of many clusters that QEMU did not allocate in a row, and filesystems that only
a kernel reads; of these too it cannot be told.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.states.timeline import CrashDisk, Timeline
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import ExtentSet
from nbdproxy.oracles import check
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.ext4.inode import Inode
from nbdproxy.oracles.ext4.mounted import open_filesystem
from nbdproxy.oracles.manifest import Entry
from nbdproxy.oracles.mounts import Mount
from nbdproxy.oracles.partitions import Slice
from nbdproxy.oracles.qcow2 import Qcow2Device, is_qcow2
from nbdproxy.oracles.watched import WatchedDevice
from nbdproxy.requests import Command

_HASHED_MAX = 1 << 30
"""So many bytes are hashed in search of clusters, about a second's work."""
_TRIED_MAX = 64 << 20
"""So many of them for one file, and no larger file is tried."""


class Unmapped:
    """Tells, for one cut, whether a file was still in the guest, or its qcow2 table in QEMU.

    Asked of files that are not whole even with all that was sent.
    """

    def __init__(self, timeline: Timeline, position: int, mount: Mount) -> None:
        self._filesystem: Filesystem | None = None
        self._orphans: list[int] = []
        disk = timeline.at(position)
        if not is_qcow2(disk):
            return
        try:
            self._disk, self._file = disk, Qcow2Device(disk)
            self._orphans = orphans(timeline, disk, self._file)
            if not self._orphans:
                return
            self._guest = WatchedDevice(self._file)
            self._part: Slice = check.only(check.candidates(self._guest, mount.partition))
            self._guest.take()
            self._filesystem = open_filesystem(self._part.device, mount)
        except FilesystemError:
            return
        self._places: dict[int, int] = {}
        self._last = 0
        self._left = _HASHED_MAX
        self._has_hole = False

    def cause(self, entry: Entry) -> Cause:
        """Return the cause for a file that is not whole even with all that was sent."""
        if not self._orphans:
            return Cause.NEVER_SENT  # whatever was written, something leads to
        if self._filesystem is None:
            return Cause.CANNOT_BE_TOLD
        try:
            node = self._filesystem.lookup(check.absolute(entry.path))
            holes = list(self._holes(node)) if node is not None and node.is_regular else []
            # A hole on the way to one file may be on the way to every later one.
            self._has_hole |= any(self._is_hole(*part) for part in self._guest.take())
            if node is not None and holes and self._is_proved(entry, node, holes):
                return Cause.MAPPING_NEVER_SENT
        except FilesystemError:
            return Cause.CANNOT_BE_TOLD
        return Cause.CANNOT_BE_TOLD if holes or self._has_hole else Cause.NEVER_SENT

    def _is_hole(self, start: int, end: int) -> bool:
        return any(run.host is None for run in self._file.runs(start, end))

    def _holes(self, node: Inode) -> Iterator[tuple[int, int, int]]:
        """Yield the file's data that has no entry: offset in it, the guest's address, length."""
        assert self._filesystem is not None
        size, cluster = self._filesystem.superblock.block_size, self._file.cluster
        for run in self._filesystem.runs(node):
            offset = run.logical * size
            for extent in self._part.on_disk(run.physical * size, run.blocks * size):
                for piece in self._file.runs(extent.offset, extent.end):
                    at = piece.start
                    while piece.host is None and at < piece.end:
                        end = min(piece.end, (at // cluster + 1) * cluster)
                        yield offset + at - extent.offset, at, end - at
                        at = end
                offset += extent.length

    def _is_proved(self, entry: Entry, node: Inode, holes: list[tuple[int, int, int]]) -> bool:
        """Tell whether the file is whole with clusters in its holes that nothing leads to."""
        assert self._filesystem is not None
        if entry.target is not None or entry.size not in {None, node.size}:
            return False
        if node.size > _TRIED_MAX:
            return False
        content = bytearray().join(self._filesystem.chunks(node))
        self._guest.take()
        cluster = self._file.cluster
        wanted = dict.fromkeys(at // cluster for _, at, _ in holes)
        unknown = [number for number in wanted if number not in self._places]
        left, each = _TRIED_MAX, max(node.size, self._file.cluster)
        for hosts in self._candidates(len(unknown)):
            self._left -= each
            left -= each
            if min(left, self._left) < 0:
                return False
            tried = {**self._places, **dict(zip(unknown, hosts, strict=True))}
            for offset, at, length in holes:
                end = max(offset, min(offset + length, node.size))
                content[offset:end] = self._read(tried[at // cluster] + at % cluster, end - offset)
            if entry.is_of(bytes(content)):
                self._places = tried
                self._last = max(hosts, default=self._last)
                return True
        return False

    def _candidates(self, count: int) -> Iterator[tuple[int, ...]]:
        """Yield clusters that some holes may have been given, the likeliest first.

        QEMU allocates in a row, and what follows the last find is most likely; but requests may
        overtake each other.
        """
        taken = set(self._places.values())
        free = [at for at in self._orphans if at not in taken]
        there, cluster = set(free), self._file.cluster
        free.sort(key=lambda at: (at < self._last, at))
        for first in free if count else ():
            row = tuple(range(first, first + count * cluster, cluster))
            if there.issuperset(row):
                yield row
        if count != 1:
            yield from itertools.permutations(free, count)

    def _read(self, at: int, length: int) -> bytes:
        there = max(0, min(length, self._disk.size - at))
        return (self._disk.pread(at, there) if there else b"").ljust(length, b"\0")


def orphans(timeline: Timeline, disk: CrashDisk, file: Qcow2Device) -> list[int]:
    """Return the clusters of a qcow2 file that were written by a cut, and nothing leads to."""
    known = ExtentSet((*(own for _, own in file.structures()), *file.on_disk(0, file.size)))
    table = timeline.table
    rows = np.flatnonzero((table.command == Command.WRITE) & (table.seq < disk.state.position))
    found: set[int] = set()
    for extent in table.extents(rows):
        for part in known.missing(extent.offset, extent.end):
            found.update(range(part.offset // file.cluster, -(-part.end // file.cluster)))
    return [number * file.cluster for number in sorted(found)]

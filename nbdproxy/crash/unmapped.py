"""Files below qcow2 whose data was sent, and whose way to it was not: the entry in an L2 table.

QEMU keeps qcow2's tables in its memory until a flush. Data that was written into a new cluster then
stands in the file, and no entry leads to it: the guest reads zeroes. Such a cluster is told by two
facts: the file's blocks have no entry, and something was written that no entry leads to.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nbdproxy.crash.timeline import CrashDisk, Timeline
from nbdproxy.errors import FilesystemError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles import check
from nbdproxy.oracles.ext4.mounted import open_filesystem
from nbdproxy.oracles.qcow2 import Qcow2Device, is_qcow2
from nbdproxy.requests import Command


def unmapped(
    timeline: Timeline, position: int, paths: Iterable[str], partition: int | None
) -> frozenset[str]:
    """Return those files whose blocks had no entry in a qcow2 table by a cut, though data was sent.

    None, if the recording is not from below qcow2, or its filesystem is not of the ext family.
    """
    disk = timeline.at(position)
    if not is_qcow2(disk):
        return frozenset()
    try:
        if not orphans(timeline, disk, Qcow2Device(disk)):
            return frozenset()
        part = check.only(check.candidates(disk, partition))
        filesystem = open_filesystem(part.device)
        size = filesystem.superblock.block_size
        found = set()
        for path in paths:
            node = filesystem.lookup(check.absolute(path))
            if node is None or not node.is_regular:
                continue
            for run in filesystem.runs(node):
                there = part.on_disk(run.physical * size, run.blocks * size)
                if sum(extent.length for extent in there) < run.blocks * size:
                    found.add(path)
                    break
    except FilesystemError:
        return frozenset()
    return frozenset(found)


def orphans(timeline: Timeline, disk: CrashDisk, file: Qcow2Device) -> list[Extent]:
    """Return what was written to a qcow2 file by a cut, and nothing in the file leads to."""
    known = ExtentSet()
    for extent in (*(own for _, own in file.structures()), *file.on_disk(0, file.size)):
        known.add(extent.offset, extent.end)
    table = timeline.table
    rows = np.flatnonzero((table.command == Command.WRITE) & (table.seq < disk.state.position))
    found = ExtentSet()
    for row in rows.tolist():
        start = int(table.offset[row])
        for part in known.missing(start, start + int(table.length[row])):
            found.add(part.offset, part.end)
    return list(found)

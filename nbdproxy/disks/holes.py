"""Where a sparse file holds data, by SEEK_DATA and SEEK_HOLE (lseek(2))."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from nbdproxy.extents import Extent


def data_extents(fd: int, offset: int, length: int) -> Iterator[Extent]:
    """Yield the parts of a file that are not holes; everything where holes cannot be told."""
    at, end = offset, offset + length
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            yield Extent.between(at, end)
            return
        if start >= end:
            return
        stop = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        yield Extent.between(start, stop)
        at = stop

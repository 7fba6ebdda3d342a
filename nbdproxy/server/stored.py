"""A store as it is now, read from ordinary code: a raw file, a qcow2 file, or an NBD server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.server.qcow2 import guests_view
from nbdproxy.server.upstream import connected
from nbdproxy.server.upstream_disk import UpstreamDisk

_T = TypeVar("_T")


def with_store(image: str, work: Callable[[ReadableDevice], _T], *, qcow2: bool = False) -> _T:
    """Return what `work` makes of a store: a path or an NBD URI, a qcow2 file as its guest sees it.

    Nothing is written to it. Raises ImageError if it cannot be read.
    """
    if nbd_uri.is_uri(image) or qcow2:
        return trio.run(_with_server, image, work)
    disk = FileDisk(Path(image), read_only=True)
    try:
        return work(disk)
    finally:
        disk.close()


async def _with_server(image: str, work: Callable[[ReadableDevice], _T]) -> _T:
    if not nbd_uri.is_uri(image):
        async with guests_view(Path(image), read_only=True) as where:
            return await _with_uri(where, image, work)
    return await _with_uri(nbd_uri.parse(image), image, work)


async def _with_uri(where: nbd_uri.NbdUri, image: str, work: Callable[[ReadableDevice], _T]) -> _T:
    async with connected(where, image) as upstream:
        disk = UpstreamDisk(upstream)
        # Ctrl-C does not wait for all of it.
        return await trio.to_thread.run_sync(work, disk, abandon_on_cancel=True)

"""A store as it is now, read from ordinary code: a file of some format, or an NBD server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.formats import ImageFormat
from nbdproxy.errors import ImageError
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.server.below.guests_view import guests_view
from nbdproxy.server.below.upstream import connected
from nbdproxy.server.below.upstream_disk import UpstreamDisk

_T = TypeVar("_T")


def with_store(
    image: str, work: Callable[[ReadableDevice], _T], *, form: ImageFormat = ImageFormat.RAW
) -> _T:
    """Return what `work` makes of a store: a path or an NBD URI.

    A file of a format is read as its guest sees it. Nothing is written to it. Raises ImageError if
    it cannot be read.
    """
    if nbd_uri.is_uri(image) or form is not ImageFormat.RAW:
        return _with_server(image, work, form)
    disk = FileDisk(Path(image), read_only=True)
    try:
        return work(disk)
    except OSError as error:
        raise _unreadable(image, error) from None
    finally:
        disk.close()


def _with_server(image: str, work: Callable[[ReadableDevice], _T], form: ImageFormat) -> _T:
    done: list[_T] = []
    failed: list[Exception] = []

    def outcome(disk: ReadableDevice) -> None:
        # Carried out by hand: what is raised in a nursery comes out in a group.
        try:
            done.append(work(disk))
        except OSError as error:
            failed.append(_unreadable(image, error))
        except Exception as error:
            failed.append(error)

    async def with_uri(where: nbd_uri.NbdUri) -> None:
        async with connected(where, image) as upstream:
            # Ctrl-C does not wait for all of it.
            await trio.to_thread.run_sync(outcome, UpstreamDisk(upstream), abandon_on_cancel=True)

    async def main() -> None:
        if nbd_uri.is_uri(image):
            await with_uri(nbd_uri.parse(image))
            return
        async with guests_view(Path(image), form, read_only=True) as where:
            await with_uri(where)

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        raise KeyboardInterrupt from None
    if failed:
        raise failed[0]
    return done[0]


def _unreadable(image: str, error: OSError) -> ImageError:
    return ImageError(f"{image} cannot be read: {error.strerror or error}")

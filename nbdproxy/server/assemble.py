"""Puts an export together: image, overlay, before-images, cache, policy, recording.

The image is a raw file or block device, the disk of another NBD server, or the guest's view of a
qcow2 file, which is the disk of a qemu-storage-daemon of ours.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import trio

from nbdproxy import __version__
from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import ImageError, UsageError
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.nbd.constants import TransmissionFlag
from nbdproxy.policy.model import Policy
from nbdproxy.recording.meta import Ending, Fingerprint, Meta, absolute
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.server.export import Export
from nbdproxy.server.places import find_places
from nbdproxy.server.power import Power
from nbdproxy.server.preserve import PreservingDisk
from nbdproxy.server.qcow2 import guests_view, is_qcow2
from nbdproxy.server.upstream import Upstream, connected
from nbdproxy.server.upstream_disk import UpstreamDisk

_END_S = 10
"""Seconds that a server below has at the end to make durable what it was sent."""


class ImageFormat(StrEnum):
    """How the bytes of an image are taken."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one export is to be. `image` is a path or an NBD URI, as the user named it."""

    image: str
    policy: Policy
    name: str = ""
    image_format: ImageFormat | None = None
    read_only: bool = False
    overlay: bool = False
    record: Path | None = None
    seed: int = 0
    bake: bool = False

    @property
    def kind(self) -> str:
        """What the image is, in the recording's words: raw, qcow2 or nbd."""
        if nbd_uri.is_uri(self.image):
            return "nbd"
        return "qcow2" if self.image_format is ImageFormat.QCOW2 else "raw"

    @property
    def keeps_below(self) -> bool:
        """Whether what is below is never written."""
        return self.read_only or self.overlay


@asynccontextmanager
async def opened(plan: Plan, power: Power) -> AsyncIterator[Export]:
    """Have an export for as long as the block runs; it ends in order, and so does its recording.

    Raises ImageError, UsageError or RecordingError with nothing left open.
    """
    async with AsyncExitStack() as stack:
        upstream = await _connect(plan, stack)
        export = await trio.to_thread.run_sync(_assemble, plan, power, upstream)
        if upstream is not None:
            upstream.on_lost = partial(_lose, plan, export)
            if upstream.lost is not None:  # while it was put together
                _lose(plan, export, upstream.lost)
        async with trio.open_nursery() as watch:
            watch.start_soon(export.run)
            if upstream is not None:
                watch.start_soon(_give_up, export, upstream)
            try:
                yield export
            finally:
                export.ending.set()
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(_finish, plan, export)
            watch.cancel_scope.cancel()


async def _connect(plan: Plan, stack: AsyncExitStack) -> Upstream | None:
    if plan.kind == "raw":
        return None
    if plan.kind == "nbd":
        if plan.image_format is ImageFormat.QCOW2:
            raise UsageError(
                "--format qcow2 is for files; serve the file with qemu-nbd -f qcow2, and name the "
                "URI of that"
            )
        where = nbd_uri.parse(plan.image)
    else:
        view = guests_view(Path(plan.image), read_only=plan.keeps_below)
        where = await stack.enter_async_context(view)
    return await stack.enter_async_context(connected(where, plan.image))


def _lose(plan: Plan, export: Export, reason: str) -> None:
    if plan.kind == "qcow2":
        what = f"the qemu-storage-daemon that reads {plan.image} for nbdproxy is lost"
        todo = f"check the file with: qemu-img check {plan.image}"
    else:
        what, todo = f"the NBD server of {plan.image} is lost", "start it again"
    export.fail(ImageError(f"{what}: {reason}; {todo}"))


async def _give_up(export: Export, upstream: Upstream) -> None:
    """Do not let a server that hangs keep us from ending."""
    await export.ending.wait()
    await trio.sleep(_END_S)
    upstream.lose(f"it did not answer within {_END_S} s")


def _assemble(plan: Plan, power: Power, upstream: Upstream | None) -> Export:
    disk = _open_disk(plan, upstream)
    read_only = plan.read_only
    try:
        places = find_places(plan.policy, disk)
    except BaseException:
        disk.close()
        raise
    if upstream is not None and not plan.overlay:
        read_only |= bool(upstream.info.flags & TransmissionFlag.READ_ONLY)
    try:
        recorder = _record(plan, disk, upstream) if plan.record is not None else None
    except BaseException:
        disk.close()
        raise
    stack: BlockDevice = disk
    preserver = None
    try:
        if plan.overlay:
            stack = OverlayDisk(disk)
        elif recorder is not None and not read_only:
            stack = preserver = PreservingDisk(disk, recorder)
    except (OSError, MemoryError):
        disk.close()
        raise ImageError(f"{plan.image} is too large for that here; serve it as it is") from None
    direct = upstream if not plan.overlay else None
    return Export(
        plan.name,
        stack,
        plan.policy,
        description=f"{_short_name(plan)} through nbdproxy ({plan.policy.name})",
        read_only=read_only,
        recorder=recorder,
        preserver=preserver,
        power=power,
        offered=direct.info if direct is not None else None,
        remote=direct,
        seed=plan.seed,
        places=places,
    )


def _open_disk(plan: Plan, upstream: Upstream | None) -> BlockDevice:
    if upstream is not None:
        return UpstreamDisk(upstream)
    image = Path(plan.image)
    if plan.image_format is None and is_qcow2(image):
        raise ImageError(_explain_qcow2(image))
    return FileDisk(image, read_only=plan.keeps_below)


def _short_name(plan: Plan) -> str:
    return plan.image if plan.kind == "nbd" else Path(plan.image).name


def _finish(plan: Plan, export: Export) -> None:
    """End in order: make durable what is kept, close the disk, then the recording.

    Raises RecordingError if the recording could not be completed.
    """
    try:
        writable = not export.info.flags & TransmissionFlag.READ_ONLY
        if writable and plan.bake and export.failure is None:
            export.bake()
        if writable and not export.power.off and export.failure is None:
            export.sync()
    except OSError as error:
        raise ImageError(f"{plan.image} could not be made durable: {error.strerror}") from None
    finally:
        export.close()
        if export.recorder is not None:
            export.recorder.close(Ending(export.ended, _fingerprint(plan)))


def _fingerprint(plan: Plan) -> Fingerprint | None:
    try:
        return Fingerprint.of(Path(plan.image)) if plan.kind != "nbd" else None
    except OSError:  # moved or removed meanwhile
        return None


def _record(plan: Plan, disk: BlockDevice, upstream: Upstream | None) -> RecordingWriter:
    assert plan.record is not None
    below = None if plan.overlay else upstream
    try:
        data = tuple((e.offset, e.length) for e in disk.data_extents(0, disk.size))
    except OSError as error:
        raise ImageError(f"the map of {plan.image} cannot be read: {error.strerror}") from None
    meta = Meta(
        size=disk.size,
        image=plan.image if plan.kind == "nbd" else absolute(Path(plan.image)),
        overlay=plan.overlay,
        data=data,
        base=_fingerprint(plan) or Fingerprint(disk.size, 0),
        policies=plan.policy.names,
        started=datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
        program=f"nbdproxy {__version__}",
        kind=plan.kind,
        fua=below is None or bool(below.info.flags & TransmissionFlag.SEND_FUA),
    )
    return RecordingWriter(plan.record, meta)


def _explain_qcow2(image: Path) -> str:
    return (
        f"{image} is a qcow2 file; add --format qcow2 to serve the guest's disk in it (QEMU opens "
        "it with format=raw), or --format raw to stand below it (QEMU opens it with "
        "format=qcow2,file.driver=nbd)"
    )

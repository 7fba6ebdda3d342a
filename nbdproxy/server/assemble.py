"""Puts an export together: image, overlay, before-images, cache, policy, recording.

The image is a raw file or block device, the disk of another NBD server, or the guest's view of a
file of another format, which is the disk of a qemu-storage-daemon of ours.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from nbdproxy import __version__
from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.formats import FORMATS, ImageFormat, format_of_file
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import ImageError, TemporaryFolderError, UsageError
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.nbd.constants import TransmissionFlag
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from nbdproxy.policy.model import Policy
from nbdproxy.recording.meta import Ending, Fingerprint, Meta, absolute
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.server.export import Export
from nbdproxy.server.guests_view import guests_view
from nbdproxy.server.places import find_places
from nbdproxy.server.power import Power
from nbdproxy.server.preserve import PreservingDisk
from nbdproxy.server.upstream import Upstream, connected
from nbdproxy.server.upstream_disk import UpstreamDisk

_END_S = 10
"""Seconds that a server below has at the end to make durable what it was sent."""


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
    sync_recording: bool = False
    seed: int = 0
    bake: bool = False

    @property
    def kind(self) -> str:
        """What the image is, in the recording's words: nbd, or its format."""
        return "nbd" if nbd_uri.is_uri(self.image) else str(self.image_format or ImageFormat.RAW)

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
        if plan.image_format not in {None, ImageFormat.RAW}:
            raise UsageError(
                f"--format {plan.image_format} is for files; serve the file with qemu-nbd -f "
                f"{plan.image_format}, and name the URI of that"
            )
        where = nbd_uri.parse(plan.image)
    else:
        form = ImageFormat(plan.kind)
        view = guests_view(Path(plan.image), form, read_only=plan.keeps_below)
        where = await stack.enter_async_context(view)
    return await stack.enter_async_context(connected(where, plan.image))


def _lose(plan: Plan, export: Export, reason: str) -> None:
    if plan.kind != "nbd":
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
    except TemporaryFolderError:
        disk.close()
        raise
    except (OSError, MemoryError):
        disk.close()
        raise ImageError(f"{plan.image} is too large for that here; serve it as it is") from None
    direct = upstream if not plan.overlay else None
    offered = None
    if upstream is not None:
        hint = upstream.info.flags & TransmissionFlag.ROTATIONAL
        offered = upstream.info if direct else ExportInfo("", disk.size, WRITABLE | hint)
    return Export(
        plan.name,
        stack,
        plan.policy,
        description=f"{_short_name(plan)} through nbdproxy ({plan.policy.name})",
        read_only=read_only,
        recorder=recorder,
        preserver=preserver,
        power=power,
        offered=offered,
        remote=direct,
        seed=plan.seed,
        places=places,
    )


def _open_disk(plan: Plan, upstream: Upstream | None) -> BlockDevice:
    if upstream is not None:
        return UpstreamDisk(upstream)
    image = Path(plan.image)
    if plan.image_format is None and (found := format_of_file(image)) is not None:
        raise ImageError(_explain(image, found))
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
    return RecordingWriter(plan.record, meta, durable=plan.sync_recording)


def _explain(image: Path, found: ImageFormat) -> str:
    said = FORMATS[found].said
    if found is ImageFormat.LUKS:
        return (
            f"{image} is {said}; add --format raw if it is the guest that opens it, or, if QEMU "
            "does, serve it with qemu-nbd and its key, and name the URI of that"
        )
    own = (
        f"QEMU opens it with format={found},file.driver=nbd"
        if found is ImageFormat.QCOW2
        else "the file's own bytes"
    )
    return (
        f"{image} is {said}; add --format {found} to serve the guest's disk in it (QEMU opens "
        f"it with format=raw), or --format raw to stand below it ({own})"
    )

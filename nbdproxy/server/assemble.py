"""Puts an export together: its store, its policy, its recording.

The image is a raw file or block device, the disk of another NBD server, or the guest's view of a
file of another format, which is the disk of a qemu-storage-daemon of ours.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
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
from nbdproxy.server.below.copy_before_write import CopyBeforeWriteStore, PreservingDisk
from nbdproxy.server.below.guests_view import guests_view
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.below.remote_store import RemoteStore
from nbdproxy.server.below.store import Store
from nbdproxy.server.below.upstream import Upstream, connected
from nbdproxy.server.below.upstream_disk import UpstreamDisk
from nbdproxy.server.export.export import Export
from nbdproxy.server.export.places import find_places
from nbdproxy.server.shared.power import Power

log = structlog.get_logger()

_END_S = 10
"""Seconds that a server below has at the end to make durable what it was sent."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
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
async def opened(plan: ExportPlan, power: Power) -> AsyncIterator[Export]:
    """Open an export for as long as the block runs; then close it, and its recording, in order.

    Raises ImageError, UsageError or RecordingError with nothing left open.
    """
    async with AsyncExitStack() as stack:
        upstream = await _connect(plan, stack)
        held = _Held(plan)
        stack.callback(held.close)
        export = await trio.to_thread.run_sync(_assemble, plan, power, upstream, held)
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
                    await trio.to_thread.run_sync(_finish, plan, export, held)
            watch.cancel_scope.cancel()


async def _connect(plan: ExportPlan, stack: AsyncExitStack) -> Upstream | None:
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


def _lose(plan: ExportPlan, export: Export, reason: str) -> None:
    if plan.kind != "nbd":
        what = f"the qemu-storage-daemon that reads {plan.image} for nbdproxy is lost"
        todo = f"check the file with: qemu-img check {plan.image}"
    else:
        what, todo = f"the NBD server of {plan.image} is lost", "start it again"
    export.fail(ImageError(f"{what}: {reason}; {todo}"))


async def _give_up(export: Export, upstream: Upstream) -> None:
    """Give up a server below that does not answer `_END_S` after the ending began."""
    await export.ending.wait()
    await trio.sleep(_END_S)
    upstream.lose(f"it did not answer within {_END_S} s")


def _assemble(plan: ExportPlan, power: Power, upstream: Upstream | None, held: _Held) -> Export:
    disk = _open_disk(plan, upstream)
    read_only = plan.read_only
    try:
        if not held.is_of(disk):
            raise ImageError(f"{plan.image} was replaced while it was opened; start again")
        places = find_places(plan.policy, disk)
    except BaseException:
        disk.close()
        raise
    if upstream is not None and not plan.overlay:
        read_only |= bool(upstream.info.flags & TransmissionFlag.READ_ONLY)
    try:
        recorder = _record(plan, disk, upstream, held) if plan.record is not None else None
    except BaseException:
        disk.close()
        raise
    try:
        base = _make_store(plan, power, disk, upstream, None if read_only else recorder)
    except TemporaryFolderError:
        disk.close()
        raise
    except (OSError, MemoryError):
        disk.close()
        raise ImageError(f"{plan.image} is too large for that here; serve it as it is") from None
    offered = None
    if upstream is not None:
        hint = upstream.info.flags & TransmissionFlag.ROTATIONAL
        offered = ExportInfo("", disk.size, WRITABLE | hint) if plan.overlay else upstream.info
    return Export(
        plan.name,
        base,
        plan.policy,
        description=f"{_short_name(plan)} through nbdproxy ({plan.policy.name})",
        read_only=read_only,
        recorder=recorder,
        offered=offered,
        seed=plan.seed,
        places=places,
    )


def _make_store(
    plan: ExportPlan,
    power: Power,
    disk: BlockDevice,
    upstream: Upstream | None,
    recorder: RecordingWriter | None,
) -> Store:
    """Return the store that policies stand on; `recorder` is set if changes are recorded."""
    if plan.overlay:
        return ImageStore(OverlayDisk(disk), power)
    store = RemoteStore(upstream, disk, power) if upstream else ImageStore(disk, power)
    if recorder is None:
        return store
    return CopyBeforeWriteStore(store, PreservingDisk(disk, recorder))


def _open_disk(plan: ExportPlan, upstream: Upstream | None) -> BlockDevice:
    if upstream is not None:
        return UpstreamDisk(upstream)
    image = Path(plan.image)
    if plan.image_format is None and (found := format_of_file(image)) is not None:
        raise ImageError(_explain(image, found))
    return FileDisk(image, read_only=plan.keeps_below)


def _short_name(plan: ExportPlan) -> str:
    return plan.image if plan.kind == "nbd" else Path(plan.image).name


def _finish(plan: ExportPlan, export: Export, held: _Held) -> None:
    """End in order: make durable what is kept, close the disk, then the recording.

    The recording ends in order whatever the disk does. Raises RecordingError if it could not be
    completed, ImageError if the image's store failed.
    """
    failed: list[str] = []
    try:
        for what, step in (
            ("made durable", partial(_keep, plan, export)),
            ("closed", export.close),
        ):
            try:
                step()
            except OSError as error:
                reason = error.strerror or error
                failed.append(f"{plan.image} could not be {what}: {reason}")
    finally:
        moved = held.moved()
        if moved:
            log.warning(moved)
        if export.recorder is not None:
            ended = "; ".join([export.ended, *failed, *([moved] if moved else [])])
            export.recorder.close(Ending(ended, held.fingerprint()))
    if failed:
        raise ImageError(f"{failed[0]}; see to the disk that it is on")


def _keep(plan: ExportPlan, export: Export) -> None:
    """Make durable what a client wrote, if that is to stay; raises OSError."""
    writable = not export.info.flags & TransmissionFlag.READ_ONLY
    if not writable or export.failure is not None:
        return
    if plan.bake:
        export.bake()
    if not export.power.off:
        export.sync()


class _Held:
    """The image's file, kept open (O_PATH) while its path may change; none for a server."""

    def __init__(self, plan: ExportPlan) -> None:
        self._path = Path(plan.image)
        self._fd = -1
        if plan.kind != "nbd":
            with suppress(OSError):  # whoever opens it to be served says so
                self._fd = os.open(plan.image, os.O_PATH | os.O_CLOEXEC)

    def is_of(self, disk: BlockDevice) -> bool:
        """Tell whether a disk is made of that file, as far as that can be seen."""
        if self._fd < 0 or not isinstance(disk, FileDisk):
            return True
        return os.path.samestat(os.fstat(self._fd), disk.status)

    def moved(self) -> str:
        """Return a sentence if the path does not name the file any more; else an empty text."""
        try:
            if self._fd < 0 or os.path.samestat(os.fstat(self._fd), self._path.stat()):
                return ""
        except FileNotFoundError:
            pass
        except OSError:
            return ""  # a store that fails: others say so
        return (
            f"{self._path} was moved, replaced or removed while it was served: the file of "
            "that name is not what was recorded; name that with --base"
        )

    def fingerprint(self) -> Fingerprint | None:
        """Return what the file is like now; None if that cannot be told."""
        try:
            return Fingerprint.of(self._fd) if self._fd >= 0 else None
        except OSError:
            return None

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
        self._fd = -1


def _record(
    plan: ExportPlan, disk: BlockDevice, upstream: Upstream | None, held: _Held
) -> RecordingWriter:
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
        base=held.fingerprint() or Fingerprint(disk.size, 0),
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

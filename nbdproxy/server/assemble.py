"""Puts an export together: image, overlay, before-images, cache, policy, recording."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from nbdproxy import __version__
from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import ImageError
from nbdproxy.policy.model import Policy
from nbdproxy.recording.meta import Ending, Fingerprint, Meta, absolute
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.server.export import Export
from nbdproxy.server.preserve import PreservingDisk

QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Plan:
    """What `nbdproxy serve` was asked for. `raw` says that the image's bytes are the disk."""

    image: Path
    policy: Policy
    name: str = ""
    raw: bool = False
    read_only: bool = False
    overlay: bool = False
    record: Path | None = None


def assemble(plan: Plan) -> Export:
    """Return the export; raises ImageError or RecordingError with nothing left open."""
    if not plan.raw and is_qcow2(plan.image):
        raise ImageError(_explain_qcow2(plan.image))
    disk = FileDisk(plan.image, read_only=plan.read_only or plan.overlay)
    try:
        recorder = _record(plan, disk) if plan.record is not None else None
    except BaseException:
        disk.close()
        raise
    stack: BlockDevice = disk
    preserver = None
    if plan.overlay:
        stack = OverlayDisk(disk)
    elif recorder is not None and not plan.read_only:
        stack = preserver = PreservingDisk(disk, recorder)
    return Export(
        plan.name,
        stack,
        plan.policy,
        description=f"{plan.image.name} through nbdproxy ({plan.policy.name})",
        read_only=plan.read_only,
        recorder=recorder,
        preserver=preserver,
    )


def finish(plan: Plan, export: Export, reason: str) -> None:
    """End in order: make durable what is kept, close the disk, then the recording.

    Raises RecordingError if the recording could not be completed.
    """
    try:
        if not export.fenced and export.failure is None and not plan.read_only:
            export.sync()
    except OSError as error:
        raise ImageError(f"{plan.image} could not be made durable: {error.strerror}") from None
    finally:
        export.close()
        if export.recorder is not None:
            export.recorder.close(Ending(reason, _fingerprint(plan.image)))


def _fingerprint(image: Path) -> Fingerprint | None:
    try:
        return Fingerprint.of(image)
    except OSError:  # moved or removed meanwhile
        return None


def _record(plan: Plan, disk: FileDisk) -> RecordingWriter:
    assert plan.record is not None
    meta = Meta(
        size=disk.size,
        image=absolute(plan.image),
        overlay=plan.overlay,
        data=tuple((e.offset, e.length) for e in disk.data_extents(0, disk.size)),
        base=Fingerprint.of(plan.image),
        policies=(plan.policy.name,),
        started=datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
        program=f"nbdproxy {__version__}",
    )
    return RecordingWriter(plan.record, meta)


def is_qcow2(image: Path) -> bool:
    """Tell it before the size is looked at: a new qcow2 file is no multiple of 512 bytes."""
    try:
        if not (image.is_file() or image.is_block_device()):
            return False
        with image.open("rb") as file:
            return file.read(len(QCOW2_MAGIC)) == QCOW2_MAGIC
    except OSError:
        return False  # opening it for good will say why


def _explain_qcow2(image: Path) -> str:
    return (
        f"{image} is a qcow2 file; add --format raw to stand below it (QEMU opens it with "
        "format=qcow2,file.driver=nbd), or export the guest's disk as a raw file with "
        "qemu-storage-daemon and serve that (README, 'Above qcow2')"
    )

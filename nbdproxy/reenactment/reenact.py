"""Plays a recording from above a qcow2 file into QEMU's driver, and records the file below.

Whoever records above the format has every request of the guest; what QEMU makes of them in the file
depends on its cache mode, and on tables in its memory. So its own driver is asked: requests are
sent to it in the order of a `Schedule`, and what it writes is a recording like any other, for which
the rules of raw disks hold. One thread does both, so that for every cut above it is known how much
was recorded below.

Not covered: reads, which are in no recording. They make the driver load tables; where its cache
cannot hold all, one that was changed may have to leave it, and is written earlier than here; the
`remark` says so. Options that QEMU was given, as `l2-cache-size`. What the driver of a real file
does and a socket does not, as with blocks of 4096 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbdproxy import __version__
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import ImageError, RecordingError
from nbdproxy.persistence.modes import THROUGH, CacheMode, check_projection, recorded_under
from nbdproxy.private import open_folder
from nbdproxy.recording.meta import Ending, Fingerprint, Meta, absolute
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.reenactment.driver import format_driver, qemu_version
from nbdproxy.reenactment.file_server import FileServer
from nbdproxy.reenactment.layout import Layout
from nbdproxy.reenactment.payloads import Payloads
from nbdproxy.reenactment.result import Reenacted
from nbdproxy.reenactment.schedule import Schedule, schedule
from nbdproxy.reenactment.scratch_copy import ScratchCopy
from nbdproxy.reenactment.wires import Wires
from nbdproxy.requests import Command, CommandFlag, Request

Progress = Callable[[int, int], None]
"""Told how many steps are done, and how many there are."""

_FILE, _DATA_FILE = "file", "data-file"
_STEPS = 4096
"""Steps between two reports of progress."""
_ROOM = 64 << 20
_LONGEST = 1 << 30
"""Bytes of one request: the headers that QEMU 7.2 takes have 32 bits for them."""
_CACHE = 32 << 20
_EVICTED = (
    "the L2 tables of this disk may be larger than QEMU's cache for them (32 MiB by default): what "
    "the guest read, which is not recorded, may have made QEMU write some of them earlier"
)
_WRITE, _FUA = int(Command.WRITE), int(CommandFlag.FUA)
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class PlaySource:
    """What is played: a recording, and the image as it was when that began.

    image      the qcow2 file, unchanged or put back; it is not written to
    data_file  its external data file as it was; None for the one that its header names
    stated     the cache mode that the recording was taken under, if that is known
    """

    recording: Recording
    image: Path
    data_file: Path | None = None
    stated: CacheMode | None = None


def reenact(
    played: PlaySource,
    mode: CacheMode,
    run: Path,
    *,
    cuts: Iterable[int] = (),
    progress: Progress = lambda _done, _all: None,
) -> Reenacted:
    """Play a recording for a cache mode, and record the files below in the new folder `run`.

    `cuts` are those that shall be exact, see `Schedule`; the end always is. The more there are, the
    less is in flight at once, and the longer it takes. Blocks. Raises ProjectionError if the
    recording lacks the flushes that the mode would need, ImageError if the image is not the one
    that was recorded or QEMU does not do what it had done, RecordingError if a recording is damaged
    or cannot be written.
    """
    recording = played.recording
    taken = recorded_under(recording.table, played.stated, offers_fua=recording.meta.offers_fua)
    check_projection(taken, [mode])
    plan = schedule(recording.table, mode, events=recording.events, cuts=cuts)
    qemu = qemu_version()
    os.close(open_folder(run, sticky=False, make=True))
    with ExitStack() as stack:
        image = FileDisk(played.image, read_only=True)
        stack.callback(image.close)
        layout = Layout.of(image, played.image)
        files, options = _open(played, layout, image, run, stack)
        driver = stack.enter_context(format_driver(mode, list(files), options))
        servers = [
            FileServer(sock, *file, flushes=mode is not CacheMode.UNSAFE)
            for sock, file in zip(driver.below, files.values(), strict=True)
        ]
        wires = Wires(driver, servers)
        if (size := wires.wait_ready()) != recording.size:
            raise ImageError(
                f"the guest's disk in {played.image} has {size} bytes, and the one that was "
                f"recorded {recording.size}; name the right image"
            )
        positions = _play(recording, plan, mode, wires, progress)
        wires.finish()
    remark = _EVICTED if layout.tables > _CACHE else ""
    done = Reenacted(run, mode, qemu, remark, tuple(files), positions, plan.exact)
    done.save()
    return done


def _play(
    recording: Recording, plan: Schedule, mode: CacheMode, wires: Wires, progress: Progress
) -> NDArray[np.int64]:
    """Do all steps; return the positions below for each cut above."""
    kept = ~_FUA if mode in THROUGH else ~0  # there QEMU makes durable what it has to
    cuts = [0]
    positions = [wires.positions]
    with closing(Payloads(recording)) as payloads:
        for number, step in enumerate(plan.steps(recording.table)):
            cut, row, is_wait, command, flags, offset, length, position = step
            if number % _STEPS == 0:
                progress(number, len(plan))
            if not is_wait:
                data = payloads.of(row, position, length) if command == _WRITE else _NOTHING
                while length > _LONGEST:
                    wires.request(Request(command, flags & kept, row, offset, _LONGEST, data))
                    wires.wait(row)
                    offset, length = offset + _LONGEST, length - _LONGEST
                wires.request(Request(command, flags & kept, row, offset, length, data))
            elif wires.wait(row):
                cuts.append(cut)
                positions.append(wires.positions)
    progress(len(plan), len(plan))
    # The last of those at one cut counts.
    times = np.diff([*cuts, max(recording.events, cuts[-1]) + 1])
    return np.repeat(np.array(positions, np.int64), times, axis=0)[: recording.events + 1]


def _open(
    played: PlaySource, layout: Layout, image: FileDisk, run: Path, stack: ExitStack
) -> tuple[dict[str, tuple[ScratchCopy, RecordingWriter]], dict[str, object]]:
    """Open the files that the driver writes; return them by the node's child, and its options."""
    size = _room(played.recording, layout, image.size)
    files = {_FILE: stack.enter_context(_recorded(image, size, run / _FILE))}
    options: dict[str, object] = {}
    if (backing := layout.backing_node(played.image)) is not None:
        options["backing"] = backing
    if layout.data_file is not None:
        disk = FileDisk(played.data_file or Path(layout.data_file), read_only=True)
        stack.callback(disk.close)
        size = _room(played.recording, layout, max(disk.size, layout.size))
        files[_DATA_FILE] = stack.enter_context(_recorded(disk, size, run / _DATA_FILE))
    return files, options


def _room(recording: Recording, layout: Layout, size: int) -> int:
    """Return how many bytes a file can have in the end at most: NBD cannot make it longer."""
    table, cluster = recording.table, layout.cluster
    touched = table.length // cluster + 2
    # A cluster of the guest's, and tables for it.
    most = 2 * min(int(touched.sum()), layout.size // cluster + 1) * cluster
    return -(-(size + most + _ROOM) // cluster) * cluster


@contextmanager
def _recorded(
    disk: FileDisk, size: int, folder: Path
) -> Iterator[tuple[ScratchCopy, RecordingWriter]]:
    """Have a copy of a file, and its recording, which says how the block ended."""
    meta = Meta(
        size=size,
        image=absolute(disk.path),
        overlay=True,
        data=tuple((one.offset, one.length) for one in disk.data_extents(0, disk.size)),
        base=Fingerprint.of(disk.path),
        policies=(),
        started=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        program=f"nbdproxy {__version__}",
        fua=True,
    )
    copy = ScratchCopy(disk, size)
    try:
        writer = RecordingWriter(folder, meta)
        try:
            yield copy, writer
        except BaseException:
            with suppress(RecordingError):
                writer.close(Ending("the re-enactment failed", None))
            raise
        writer.close(Ending("re-enacted", meta.base))
    finally:
        copy.close()

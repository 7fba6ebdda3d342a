"""Audits: the store of a recording as it is now, against what was acknowledged to its client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbdproxy.crash.blame.audit import Auditor, timeline_on
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.formats import FORMATS, ImageFormat, format_of_file
from nbdproxy.errors import UsageError
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.persistence.model import Options
from nbdproxy.recording.meta import IMPORTED, Fingerprint
from nbdproxy.report.audited import AuditReport, owners_of


def auditable_format(
    source: RecordedSource, store: str, said: ImageFormat | None = None
) -> ImageFormat:
    """Return how a store of a recording is read: the guest's view of a file where it was recorded.

    `store` is a path or an NBD URI, and `said` what the user says that the file is. Raises
    UsageError if there is nothing to compare a store with: of a recording that was imported, or
    made over an overlay.
    """
    form = _format(source, store, said)
    if source.meta.policies == IMPORTED:
        raise UsageError(
            f"{source.path} was imported from a log: audit needs a recording of nbdproxy's own"
        )
    if source.meta.overlay:
        raise UsageError(
            f"{source.path} was recorded with --overlay: nothing of it was ever written to the "
            f"store"
        )
    return form


def audit(
    source: RecordedSource,
    store: str,
    disk: ReadableDevice,
    options: Options,
    progress: Callable[[int, int], None],
) -> AuditReport:
    """Compare a store, opened as `disk`, with a recording; `progress` gets bytes done, and of all.

    Raises UsageError if it has another size than the disk that was recorded.
    """
    if disk.size != source.size:
        told = format_of_file(Path(store))
        is_of = "" if told is None else f" ({FORMATS[told].said}: --format {told})"
        raise UsageError(
            f"{store} has {disk.size:,} bytes, and the disk that was recorded {source.size:,};"
            f" name the store of this recording, or what it is with --format{is_of}"
        )
    timeline = timeline_on(source, disk)
    found = Auditor(timeline, disk, options).run(progress)
    owners = owners_of(timeline, found)
    return AuditReport(source, store, timeline, options, found, owners, _is_changed(source, store))


def _is_changed(source: RecordedSource, store: str) -> bool:
    """Tell whether the recording's own image was changed after the recording ended."""
    ended = source.ending.image if source.ending is not None else None
    try:
        own = Path(store).samefile(source.meta.image)
        return own and ended is not None and Fingerprint.of(Path(store)) != ended
    except OSError:
        return False


def _format(source: RecordedSource, store: str, said: ImageFormat | None) -> ImageFormat:
    if nbd_uri.is_uri(store):
        if said is not None:
            raise UsageError("--format is for files; an NBD server knows what it serves: drop it")
        return ImageFormat.RAW
    if said is None and source.meta.kind != "raw":
        said = format_of_file(Path(store))
    return said or ImageFormat.RAW

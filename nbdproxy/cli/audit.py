"""`nbdproxy audit`: does the store have what it acknowledged?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.cli.choices import Covers, Fsyncgate
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.recorded import recorded
from nbdproxy.crash.blame.audit import Auditor, timeline_on
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.formats import FORMATS, ImageFormat, format_of_file
from nbdproxy.errors import UsageError
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.persistence.model import Coverage, Options
from nbdproxy.recording.meta import IMPORTED, Fingerprint
from nbdproxy.report import audited
from nbdproxy.server.below.stored import with_store


def audit(
    run: Annotated[Path, typer.Argument(help="A recording that has ended.")],
    image: Annotated[str, typer.Argument(help="The store as it is now: a file or an NBD URI.")],
    image_format: Annotated[
        ImageFormat | None,
        typer.Option("--format", help="What a file is.", show_default="as it was recorded"),
    ] = None,
    covers: Covers = Coverage.RECEIVED,
    fsyncgate: Fsyncgate = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the store with what was acknowledged: has it everything that a flush made durable?

    Each sector that was sent holds what was sent last; or something older that no flush had
    replaced, which is allowed; or it is a broken promise of what stands below nbdproxy. Look before
    anybody else writes to the store, and, if a host lost power, on a host that has forgotten its
    page cache. Exit code 1 if a promise was broken, or a place holds what it never may have; 2 if
    that cannot be told, because the recording was cut off or has no write.

    Examples:

      nbdproxy audit run1 disk.img

      nbdproxy audit run1 /mnt/gluster/disk.qcow2

      nbdproxy audit run1 nbd://storage.example/disk --json
    """
    with recorded(run, note=False) as source:
        form = _form(source, image, image_format)
        _refuse_what_never_reached_a_store(run, source)

        def work(store: ReadableDevice) -> int:
            return _audit(source, image, store, Options(coverage=covers, fsyncgate=fsyncgate), json)

        try:
            code = with_store(image, work, form=form)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    raise typer.Exit(code)


def _audit(
    source: RecordedSource, image: str, store: ReadableDevice, options: Options, as_json: bool
) -> int:
    """Compare, print, and return the exit code."""
    if store.size != source.size:
        told = format_of_file(Path(image))
        is_of = "" if told is None else f" ({FORMATS[told].said}: --format {told})"
        raise UsageError(
            f"{image} has {store.size:,} bytes, and the disk that was recorded {source.size:,};"
            f" name the store of this recording, or what it is with --format{is_of}"
        )
    timeline = timeline_on(source, store)
    with err.status("comparing") as status:
        found = Auditor(timeline, store, options).run(
            lambda done, total: status.update(f"comparing: {100 * done // max(total, 1)} %")
        )
    owners = audited.owners_of(timeline, found)
    changed = _is_changed(source, image)
    report = audited.AuditReport(source, image, timeline, options, found, owners, changed)
    if as_json:
        print_json(audited.to_json(report))
    else:
        for line in audited.lines(report):
            out.print(line, markup=False)
    return report.code


def _refuse_what_never_reached_a_store(run: Path, source: RecordedSource) -> None:
    if source.meta.policies == IMPORTED:
        raise UsageError(
            f"{run} was imported from a log: audit needs a recording of nbdproxy's own"
        )
    if source.meta.overlay:
        raise UsageError(
            f"{run} was recorded with --overlay: nothing of it was ever written to the store"
        )


def _is_changed(source: RecordedSource, image: str) -> bool:
    """Tell whether the recording's own image was changed after the recording ended."""
    ended = source.ending.image if source.ending is not None else None
    try:
        own = Path(image).samefile(source.meta.image)
        return own and ended is not None and Fingerprint.of(Path(image)) != ended
    except OSError:
        return False


def _form(source: RecordedSource, image: str, said: ImageFormat | None) -> ImageFormat:
    """Return how a store is read: the guest's view of a file where that was recorded."""
    if nbd_uri.is_uri(image):
        if said is not None:
            raise UsageError("--format is for files; an NBD server knows what it serves: drop it")
        return ImageFormat.RAW
    if said is None and source.meta.kind != "raw":
        said = format_of_file(Path(image))
    return said or ImageFormat.RAW

"""`nbdproxy convert`: recordings to and from the formats of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.status import Status

from nbdproxy.cli.console import err, print_json
from nbdproxy.crash.states.log_end import Compared, compare
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.formats import FORMATS, format_of_file
from nbdproxy.errors import RecordingError, UsageError
from nbdproxy.private import New, new_file
from nbdproxy.recording.foreign.dm_log_writes import DmLog, DmLogWriter
from nbdproxy.recording.foreign.exporting import to_dm_log, to_trlog
from nbdproxy.recording.foreign.formats import ConversionProgress, Converted, LogFormat, look
from nbdproxy.recording.foreign.importing import (
    ImportedBase,
    disk_size,
    from_dm_log,
    from_trlog,
    meta_of,
    recorded,
)
from nbdproxy.recording.foreign.nbd_trlog import TransactionLog, TransactionLogWriter
from nbdproxy.recording.meta import Fingerprint, absolute
from nbdproxy.recording.reader import Recording
from nbdproxy.sizes import parse_size


@dataclass(frozen=True, slots=True)
class _Conversion:
    """What the user asked for, checked as far as it can be without reading IN."""

    source: Path
    target: Path
    form: LogFormat
    to: LogFormat
    base: Path | None
    verify: Path | None
    size: int | None
    uncounted: bool


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A recording or a log.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write; must be new.")],
    to: Annotated[LogFormat, typer.Option("--to", help="The format of OUT.")],
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGE",
            help="What was on the disk before the recording.",
            show_default="zeroes; of a recording of ours, what it knows itself",
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="Compare the end of the log with this image."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The disk's size, where a log is read.",
            show_default="the base's, or the end of the last write",
        ),
    ] = None,
    uncounted: Annotated[
        bool,
        typer.Option(
            "--uncounted",
            help="Of a dm-log-writes log, read on behind the entries that its superblock counts.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Convert a recording to a log of dm-log-writes or nbd-server, or such a log to a recording.

    What IN is, is found by looking. What the target cannot express is said. --verify writes what
    the log says over the base, in the log's order, and compares that with an image. Exit code 1 if
    they differ; OUT is written all the same.

    Examples:

      nbdproxy convert blklogwrites.log run1 --to nbdproxy --base before.img --verify disk.img

      nbdproxy convert run1 run1.log --to dm-log-writes

      nbdproxy convert run1 run1.trlog --to nbd-trlog && nbd-trplay -i copy.img -l run1.trlog
    """
    asked = _Conversion(source, target, look(source), to, base, verify, _size(size), uncounted)
    _check(asked)
    _look_at_images(asked)
    with ExitStack() as stack:
        made = stack.enter_context(_beside(target, is_folder=to is LogFormat.NBDPROXY))
        done, log, recording = _convert(asked, made, stack)
        compared = None
        if verify is not None:
            with err.status(f"comparing with {verify}"):
                compared = compare(log, RecordedSource(recording, image=base), verify)
        _finish(made, target)
    _report(asked, done, compared)
    if json:
        print_json(_summary(asked, done, compared))
    raise typer.Exit(0 if compared is None or compared.offset is None else 1)


def _size(text: str | None) -> int | None:
    size = None if text is None else parse_size(text)
    if text is not None and size is None:
        raise UsageError(f"--size: {text!r} is no size; write for example 10G")
    return size


def _check(asked: _Conversion) -> None:
    ours = asked.form is LogFormat.NBDPROXY
    if asked.to is asked.form:
        raise UsageError(f"{asked.source} is of the format {asked.to.value} already; copy it")
    if asked.target.exists() or asked.target.is_symlink():
        raise UsageError(f"{asked.target} exists; name a new one, or remove it first")
    if not asked.target.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {asked.target.parent}; make it first")
    if ours and asked.size is not None:
        raise UsageError("--size is for logs; a recording knows its disk's size: drop it")
    if ours and asked.base is not None and asked.verify is None:
        raise UsageError("the base of a recording is needed only to --verify; drop --base")
    if asked.uncounted and asked.form is not LogFormat.DM_LOG_WRITES:
        raise UsageError("--uncounted is for dm-log-writes logs; drop it")


def _look_at_images(asked: _Conversion) -> None:
    """Refuse an image that cannot be read before the work begins, not behind it."""
    images = [path for path in (asked.base, asked.verify) if path is not None]
    if len(images) == 2 and all(path.exists() for path in images) and images[0].samefile(images[1]):
        raise UsageError(
            "--base is the disk before the log and --verify the one after it, not the same file; "
            "name a copy made before, or drop one of them"
        )
    for image in dict.fromkeys(images):
        if (found := format_of_file(image)) is not None:
            err.print(
                f"note: {image} is {FORMATS[found].said}, whose own bytes are read; if the log is "
                f"of the disk in it, give a raw copy: qemu-img convert -f {found} -O raw {image} "
                "raw.img",
                markup=False,
            )
        FileDisk(image, read_only=True).close()


@contextmanager
def _beside(target: Path, *, is_folder: bool) -> Iterator[New]:
    """Make a file or folder beside `target` that is gone afterwards, unless it was finished."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(new_file(target, is_folder=is_folder))
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error.strerror}") from None
        yield made


def _finish(made: New, target: Path) -> None:
    try:
        made.finish()
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None


def _convert(
    asked: _Conversion, made: New, stack: ExitStack
) -> tuple[Converted, DmLog | TransactionLog, Path]:
    """Write what is `made`; return the log, whichever side it is on, and the recording."""
    if asked.form is LogFormat.NBDPROXY:
        with err.status(f"reading {asked.source}") as status:
            done = _export(asked.source, made, asked.to, _progress(status, asked))
        return done, stack.enter_context(closing(_open(made.path, asked.to))), asked.source
    log = stack.enter_context(closing(_open(asked.source, asked.form, uncounted=asked.uncounted)))
    with err.status(f"reading {asked.source}") as status:
        progress = _progress(status, asked)
        if asked.to is LogFormat.NBDPROXY:
            return _import(asked, log, made.path, progress), log, made.path
        between = stack.enter_context(_beside(asked.target, is_folder=True)).path
        read = _import(asked, log, between, progress)
        written = _export(between, made, asked.to, progress)
    remarks = (*read.remarks, *written.remarks)
    left_out = {**read.left_out, **written.left_out}
    return Converted(written.counts, left_out, remarks, read.missing), log, between


def _progress(status: Status, asked: _Conversion) -> ConversionProgress:
    def told(done: int, total: int) -> None:
        status.update(f"converting {asked.source}: {100 * done // max(total, 1)} %")

    return told


def _open(path: Path, form: LogFormat, *, uncounted: bool = False) -> DmLog | TransactionLog:
    if form is LogFormat.DM_LOG_WRITES:
        return DmLog(path, uncounted=uncounted)
    return TransactionLog(path)


def _import(
    asked: _Conversion, log: DmLog | TransactionLog, folder: Path, progress: ConversionProgress
) -> Converted:
    base = None if asked.base is None else _read_base(asked.base)
    if isinstance(log, DmLog):
        meta = meta_of(disk_size(log.touches(), base, asked.size), base)
        with recorded(folder, meta, "a dm-log-writes log") as writer:
            return from_dm_log(log, writer, progress)
    survey = log.survey()
    meta = meta_of(disk_size(survey.touches, base, asked.size), base)
    with recorded(folder, meta, "a transaction log of nbd-server") as writer:
        return from_trlog(log, survey.errors, writer, progress)


def _read_base(path: Path) -> ImportedBase:
    with closing(FileDisk(path, read_only=True)) as disk:
        data = tuple((extent.offset, extent.length) for extent in disk.data_extents(0, disk.size))
        return ImportedBase(absolute(path), disk.size, data, Fingerprint.of(path))


def _export(source: Path, made: New, to: LogFormat, progress: ConversionProgress) -> Converted:
    with closing(Recording(source)) as recording:
        try:
            with open(made.fd, "wb", closefd=False) as file:
                if to is LogFormat.DM_LOG_WRITES:
                    return to_dm_log(recording, DmLogWriter(file), progress)
                return to_trlog(recording, TransactionLogWriter(file), progress)
        except OSError as error:
            raise RecordingError(f"the log cannot be written: {error.strerror}") from None


def _report(asked: _Conversion, done: Converted, compared: Compared | None) -> None:
    """Say on stderr what was written, and what it lacks."""
    counted = ", ".join(f"{count:,} {kind}" for kind, count in done.counts.items()) or "nothing"
    err.print(f"wrote {asked.target} ({asked.to.value}): {counted}", markup=False)
    for remark in done.remarks:
        err.print(f"note: {remark}", markup=False)
    if asked.form is not LogFormat.NBDPROXY and asked.base is None:
        err.print("note: the base is taken to be all zeroes; --base IMAGE names another")
        if asked.size is None:
            err.print("note: the disk is taken to end where the last write does; see --size")
    if done.missing is not None:
        err.print(f"note: {done.missing}", markup=False)
    if asked.form is LogFormat.NBDPROXY:
        err.print(
            "note: what was on the disk before is not in the log; replay it onto that: "
            f"nbdproxy open {asked.source} --at seq:0 -o base.img", markup=False,
        )  # fmt: skip
    if compared is None:
        if asked.form is not LogFormat.NBDPROXY:
            err.print("note: the end was not compared with an image; --verify IMAGE does it")
        return
    if compared.trimmed:
        err.print(
            f"note: {compared.trimmed:,} bytes of {asked.verify} are not zero where a TRIM was "
            "last: what such places hold is up to the store", markup=False,
        )  # fmt: skip
    if compared.offset is None:
        err.print(f"the end of the log equals {asked.verify}", markup=False)
    else:
        ours, theirs = compared.pair
        err.print(
            f"the end of the log differs from {asked.verify}, first at byte {compared.offset}: "
            f"{ours:#04x} in the log, {theirs:#04x} in the image; either the base is not what was "
            "there before, or the log errs, as QEMU's may where requests overlap", markup=False,
        )  # fmt: skip


def _summary(asked: _Conversion, done: Converted, compared: Compared | None) -> dict[str, Any]:
    return {
        "in": str(asked.source),
        "from": asked.form.value,
        "out": str(asked.target),
        "to": asked.to.value,
        "counts": dict(done.counts),
        "left_out": dict(done.left_out),
        "remarks": list(done.remarks),
        "missing": done.missing,
        "verified": None if compared is None else compared.offset is None,
        "difference": None if compared is None else compared.offset,
        "trimmed": None if compared is None else compared.trimmed,
    }

"""`nbdproxy pack` and `nbdproxy unpack`: a recording as one file, to send with a report."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nbdproxy.cli.choices import BaseOption
from nbdproxy.cli.console import err, print_json
from nbdproxy.cli.recorded import recorded
from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.errors import UsageError
from nbdproxy.oracles import manifest
from nbdproxy.recording import pack as packing
from nbdproxy.recording import packed
from nbdproxy.recording import unpack as unpacking
from nbdproxy.sizes import size_text

SUFFIX = ".nbdpack"


def pack(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The file to write; must be new.",
            show_default="RUN.nbdpack in this folder",
        ),
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option(metavar="MANIFEST", help="Add the files that should be there (sha256sum)."),
    ] = None,
    db: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add the verdicts of an exploration.")
    ] = None,
    base: BaseOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Pack a recording into one compressed file that needs no image: to send with a bug report.

    What the image holds and the recording lacks goes in too, so the image must be unchanged since;
    if it went on, name a copy from before with --base. The file has the disk's content: think of
    what is on it before you send it. Packing the same recording twice gives the same bytes.

    Examples:

      nbdproxy pack run1

      nbdproxy pack run1 --files npm.sha256 --db run1.db -o report.nbdpack
    """
    target = output or Path(run.resolve().name + SUFFIX)
    with ExitStack() as stack:
        source = stack.enter_context(recorded(run, base))
        extras = {}
        if files is not None:
            listed = manifest.load(files)
            extras[packed.FILES] = files
            if manifest.is_dpkg(files):  # it has another name in there, which tells less
                folder = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
                )
                extras[packed.FILES] = Path(folder, packed.FILES)
                extras[packed.FILES].write_bytes(
                    manifest.dump(listed).encode(errors="surrogateescape")
                )
        own = run / packed.VERDICTS
        if db is not None or own.exists():
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
            )
            if db is None and own.is_symlink():
                raise UsageError(f"{own} is a link; name what it leads to with --db")
            extras[packed.VERDICTS] = _snapshot(db or own, Path(folder, packed.VERDICTS))
        with err.status("looking for what only the image has"):
            parts = tuple(source.image_parts())
        disk = stack.enter_context(closing(source.base()))
        progress = stack.enter_context(_shown())
        done = packing.pack(
            source,
            target,
            base=packing.PackedBase(disk, parts) if parts else None,
            extras=extras,
            # Opening it once more tells whether the image was changed while it was read.
            confirm=lambda: source.base().close(),
            progress=progress,
        )
    unpacked = sum(member.size for member in done.index.members)
    err.print(
        f"packed {run} into {target}: {size_text(done.size)}, unpacked {size_text(unpacked)}",
        markup=False,
    )
    if json:
        print_json({"file": str(target), "bytes": done.size, **_summary(done.index)})


def unpack(
    file: Annotated[Path, typer.Argument(help="A packed recording.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The folder to make.",
            show_default="the recording's name, in this folder",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Unpack a recording that was packed; every command works on it, and needs no image.

    All of it is checked, and a file that is damaged or not what it says leaves nothing behind. A
    manifest and a database of verdicts that were packed are in the folder, too.

    Examples:

      nbdproxy unpack run1.nbdpack

      nbdproxy unpack report.nbdpack -o run1 && nbdproxy replay run1 --files run1/files.sha256
    """
    with _shown() as progress:
        done = unpacking.unpack(file, output, progress=progress)
    if done.missing:
        err.print(f"note: {done.missing}", markup=False)
    names = {member.name for member in done.index.members}
    found = [str(done.folder / name) for name in (packed.FILES, packed.VERDICTS) if name in names]
    err.print(
        f"unpacked {file} to {done.folder}" + "".join(f", with {name}" for name in found),
        markup=False,
    )
    if json:
        print_json({"recording": str(done.folder), **_summary(done.index)})


def _summary(index: packed.PackIndex) -> dict[str, Any]:
    return {
        "name": index.name,
        "program": index.program,
        "size": index.size,
        "events": index.events,
        "members": {member.name: member.size for member in index.members},
    }


def _snapshot(db: Path, copy: Path) -> Path:
    """Copy a database, with what stands beside it in a write-ahead log; return the copy."""
    if not db.is_file():
        raise UsageError(f"there is no database {db}; check the path")
    # Without a log beside it nobody has it open; then nothing need be made beside it to read it.
    how = "mode=ro" if db.with_name(db.name + "-wal").exists() else "immutable=1"
    try:
        with (
            closing(sqlite3.connect(f"{db.absolute().as_uri()}?{how}", uri=True)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.execute("PRAGMA trusted_schema = OFF")
            source.execute("SELECT 1 FROM about, state LIMIT 1")
            source.backup(target)
    except sqlite3.Error as error:
        raise UsageError(
            f"{db} is no database of verdicts ({error}); name one that explore --db made"
        ) from None
    return copy


@contextmanager
def _shown() -> Iterator[packed.PackProgress]:
    """Show on stderr how far it is."""
    columns = (
        *(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
        ),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    # Where nobody looks on, a bar would leave an empty line.
    quiet = not err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield tell

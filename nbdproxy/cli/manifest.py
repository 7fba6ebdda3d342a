"""`nbdproxy manifest`: list files with their digests, from a folder, an image or a recording."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.cli.console import print_json
from nbdproxy.crash.cuts import resolve
from nbdproxy.crash.naming import Choice, StateId
from nbdproxy.crash.recorded import RecordedSource, is_recording
from nbdproxy.crash.timeline import open_state
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import ImageError, ManifestError
from nbdproxy.oracles import check
from nbdproxy.oracles import manifest as manifests
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.persistence.model import Level


def manifest(
    where: Annotated[str, typer.Argument(metavar="DIR|IMAGE|RUN@CUT", help="What to list.")],
    under: Annotated[
        str | None, typer.Option(metavar="PATH", help="Only what is below this folder.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="For RUN@CUT: the image as it was."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the files that are there, in the format of sha256sum, with their sizes as comments.

    RUN@CUT is the disk with all that the recording's guest had sent until that instant; RUN alone
    means RUN@end: right only if the guest had ended in order, or after a sync.

    Examples:

      nbdproxy manifest ./node_modules > npm.sha256

      nbdproxy manifest disk.img --under /app/node_modules > npm.sha256

      nbdproxy manifest run1@before-exit > files
    """
    found = _list(where, under, base)
    if not found.entries:
        raise ManifestError(f"there are no files in {where}; check the path and --under")
    if json:
        print_json([{"path": e.path, "sha256": e.sha256, "size": e.size} for e in found.entries])
        return
    sys.stdout.buffer.write(manifests.dump(found).encode(errors="surrogateescape"))


def _list(where: str, under: str | None, base: Path | None) -> Manifest:
    path = Path(where)
    if is_recording(path):
        return _of_recording(path, "end", under, base)
    if path.is_dir():
        return manifests.from_directory(path, under)
    run, at, cut = where.rpartition("@")
    if at and not path.exists():
        return _of_recording(Path(run), cut, under, base)
    disk = _open_image(path)
    try:
        return check.scan(disk, under or "/")
    finally:
        disk.close()


def _open_image(path: Path) -> FileDisk:
    try:
        return FileDisk(path, read_only=True)
    except ImageError as error:
        if path.is_file() and path.stat().st_size % 512:
            # Padding it, as for a disk, would change the user's file.
            raise ManifestError(f"{path} is neither a folder nor a disk image") from None
        raise error from None


def _of_recording(run: Path, cut: str, under: str | None, base: Path | None) -> Manifest:
    source = RecordedSource(run, image=base)
    state = StateId(resolve(source, cut).position, Level.RECEIVED, Choice.ALL)
    disk = open_state(source, state)
    try:
        return check.scan(disk, under or "/")
    finally:
        disk.close()
        source.close()

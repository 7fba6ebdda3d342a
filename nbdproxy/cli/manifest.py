"""`nbdproxy manifest`: files with their digests, of a folder, image, recording or lockfile."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.oracles import OracleName
from nbdproxy.cli.choices import Mounts, PartitionOption, where_of
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import OracleChoice
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import is_recording
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.formats import refuse_foreign
from nbdproxy.errors import ManifestError, UsageError
from nbdproxy.oracles import manifest as manifests
from nbdproxy.oracles import npm
from nbdproxy.oracles.composite import scan
from nbdproxy.oracles.globs import matcher
from nbdproxy.oracles.locate import survey_tree
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.persistence.model import Level
from nbdproxy.printable import printable
from nbdproxy.recording.reader import no_recording, recordings_in


def manifest(
    where: Annotated[
        str, typer.Argument(metavar="DIR|IMAGE|RUN@CUT|LOCKFILE", help="What to list.")
    ],
    under: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Only what is below this folder; of a DIR or LOCKFILE, its place."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Leave out files and folders: anywhere, or from the top if it begins with /.",
        ),
    ] = None,
    modes: Annotated[
        bool, typer.Option("--modes", help="Also the permissions of each file.")
    ] = False,
    npm_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="For a lockfile: npm's cache.", show_default="npm's own, ~/.npm"
        ),
    ] = None,
    tarballs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For a lockfile: the packages' tarballs, by any name."),
    ] = None,
    partition: PartitionOption = None,
    mount: Mounts = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="For RUN@CUT: the image as it was."),
    ] = None,
    oracle: OracleChoice = OracleName.QUICK,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List files and symbolic links with their digests, in the format of sha256sum.

    What sha256sum has no place for are comments: sizes, links, and, with --modes, permissions.
    RUN@CUT is the disk with all that the recording's guest had sent until that instant; RUN alone
    means RUN@end: right only if the guest had ended in order, or after a sync. LOCKFILE is a
    package-lock.json: what npm ci would install, from tarballs that are checked and not installed.
    What --exclude leaves out is not read, but by the kernel oracle, which passes over sparse files
    of terabytes only. It may be given many times; * stands for anything, slashes too.
    Exit code 2, and a line on stderr for each, if what fstab mounts is on a disk or partition that
    cannot be read, or if the end that is asked for is lost: all others are listed.

    Examples:

      nbdproxy manifest ./node_modules > npm.sha256

      nbdproxy manifest disk.img --under /app/node_modules > npm.sha256

      nbdproxy manifest disk.img --exclude '*.log' --exclude /var/cache > files

      nbdproxy manifest run1@before-exit > files

      nbdproxy manifest app/package-lock.json --under /app > npm.sha256
    """
    left_out: dict[str, str] = {}
    fine = 0
    without = matcher([_meant(glob) for glob in exclude or ()])
    if Path(where).name.endswith(".json") and Path(where).is_file():
        if npm_cache is not None and tarballs is not None:
            raise UsageError("--npm-cache and --tarballs exclude each other; drop one of them")
        cache = None if tarballs is not None else npm_cache or npm.default_cache()
        source = npm.Tarballs(cache=cache, folder=tarballs)
        found = npm.from_lock(Path(where), source, under=under or "", modes=modes)
        found = Manifest(tuple(entry for entry in found.entries if not without(entry.path)))
    elif npm_cache is not None or tarballs is not None:
        raise UsageError("--npm-cache and --tarballs are for a package-lock.json; drop them")
    elif Path(where).is_dir() and not is_recording(Path(where)):
        if recordings_in(Path(where)):
            raise no_recording(Path(where))
        found = manifests.from_directory(Path(where), under, modes=modes, without=without)
    else:
        with (
            _disk(where, base) as (disk, fine),
            err.status("reading") as status,
            Case(oracle=oracle, tell=status.update) as case,
        ):
            tree = survey_tree(case.oracle, disk, where_of(None, partition, mount))
            left_out = tree.left_out(posixpath.normpath(posixpath.join("/", under or "")))
            found = scan(case.oracle, disk, under or "/", tree, modes=modes, without=without)
    for why in dict.fromkeys(left_out.values()):
        err.print(f"left out: {printable(why)}", markup=False)
    if not found.entries:
        raise ManifestError(f"there are no files in {where}; check the path, --under and --exclude")
    if json:
        print_json([_to_json(entry) for entry in found.entries])
    else:
        _print(manifests.dump(found))
    if left_out or fine:
        raise typer.Exit(2)


def _print(text: str) -> None:
    """Print a manifest: as it is, but for people so that no name steers the terminal."""
    if sys.stdout.isatty():
        for line in text.removesuffix("\n").split("\n"):
            out.print(line, markup=False)
    else:
        sys.stdout.buffer.write(text.encode(errors="surrogateescape"))
        sys.stdout.buffer.flush()


def _to_json(entry: Entry) -> dict[str, object]:
    found: dict[str, object] = {
        "path": entry.path,
        entry.algorithm: entry.digest,
        "size": entry.size,
    }
    if entry.mode is not None:
        found["mode"] = f"{entry.mode:o}"
    if entry.target is not None:
        found["target"] = entry.target
    return found


@contextmanager
def _disk(where: str, base: Path | None) -> Iterator[tuple[ReadableDevice, int]]:
    """Yield the disk of an image, or of a recording at a cut; and the exit code if all is well."""
    path = Path(where)
    run, at, cut = where.rpartition("@")
    if is_recording(path):
        run, cut = where, "end"
    elif not at or path.exists():
        with closing(FileDisk(path, read_only=True)) as image:
            refuse_foreign(image)
            yield image, 0
        return
    with recorded(Path(run), base) as source:
        state = StateId(resolve(source, cut).position, Level.RECEIVED, Choice.ALL)
        with closing(open_state(source, state)) as disk:
            yield disk, code_at(source, state.position)


def _meant(glob: str) -> str:
    """Return a pattern that may mean something; UsageError for one that cannot."""
    if not glob.removeprefix("./").strip("/"):
        raise UsageError(f"--exclude {glob!r} names nothing; name a file or a folder")
    return glob

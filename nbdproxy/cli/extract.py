"""`nbdproxy extract`: files and folders out of a state."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.oracles import OracleName
from nbdproxy.case.states import StateChoice
from nbdproxy.cli.choices import BaseOption, Mounts, PartitionOption, where_of
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.oracles import OracleChoice
from nbdproxy.cli.states import State, StateAt, StateFailure, StateMode, disk_state
from nbdproxy.errors import UsageError
from nbdproxy.oracles.browse import BrowsedEntry, FileType
from nbdproxy.oracles.check import shown
from nbdproxy.oracles.extract import Extracted
from nbdproxy.oracles.extract import extract as extract_files
from nbdproxy.printable import printable
from nbdproxy.private import check_folder
from nbdproxy.sizes import plural, size_text

_TELL_S = 0.2


def extract(
    where: Annotated[Path, typer.Argument(metavar="RUN|IMAGE", help="A recording, or an image.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Files and folders.", show_default="/"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Write here: a new or empty folder."),
    ] = None,
    state: State = None,
    at: StateAt = None,
    mode: StateMode = None,
    failure: StateFailure = None,
    partition: PartitionOption = None,
    mount: Mounts = None,
    base: BaseOption = None,
    oracle: OracleChoice = OracleName.QUICK,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Get files and folders out of a state, as a mount would show them, without root.

    The state is named as for check: by default the disk with all that had been sent at the end.
    With --mode and --failure it is the worst state that these allow, so that what replay calls
    stale or zeroed can be looked at. Content with its holes, permissions, times and symbolic links
    are kept; owners are not. A link is written and never followed. Exit code 0 if all is there,
    1 if something is lost or cannot be read, 2 if it cannot be told.

    Examples:

      nbdproxy extract run1 /app -o app

      nbdproxy extract run1 --at before-exit --mode none --failure host-power-loss /app -o lost

      nbdproxy extract run1 --state s1234.flushed.must --oracle kernel -o everything

      nbdproxy extract disk.img /etc/fstab /etc/passwd -o etc
    """
    if output is None:
        raise UsageError("where to? name a new folder with -o DIR")
    with (
        disk_state(where, StateChoice(state, at, mode, failure), base) as (source, fine),
        err.status("looking at the filesystem") as status,
        Case(oracle=oracle, tell=status.update) as case,
    ):
        tree = source.tree(case.oracle, where_of(None, partition, mount))
        _make_folder(output)
        last = time.monotonic()

        def tell(found: Extracted) -> None:
            nonlocal last
            if (now := time.monotonic()) - last > _TELL_S:
                last = now
                status.update(f"extracting: {_counts(found)}")

        found = extract_files(case.oracle, source.disk, tree, paths or ["/"], output, tell=tell)
    if json:
        print_json(_to_json(source.name, output, found))
    else:
        for word, ones in _left_out(found):
            for path, why in ones:
                out.print(f"{word:9}{printable(path)}: {printable(why)}", markup=False)
        out.print(f"wrote {_counts(found)} of {source.name} to {output}", markup=False)
    raise typer.Exit(1 if found.lost else 2 if found.doubtful else fine)


def _make_folder(output: Path) -> None:
    try:
        check_folder(output.parent)
        output.mkdir(mode=0o700, exist_ok=True)
        check_folder(output, sticky=False)
        is_empty = not any(output.iterdir())
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None
    if not is_empty:
        raise UsageError(f"{output} is not empty; name a new folder")


def _counts(found: Extracted) -> str:
    files, folders, links = (plural(found.count(kind), kind.value) for kind in _SHOWN)
    return f"{files} ({size_text(found.size)}), {folders}, {links}"


_SHOWN = (FileType.FILE, FileType.FOLDER, FileType.LINK)


def _left_out(found: Extracted) -> list[tuple[str, list[tuple[str, str]]]]:
    return [("lost", found.lost), ("unknown", found.doubtful), ("skipped", found.skipped)]


def _to_json(name: str, output: Path, found: Extracted) -> dict[str, object]:
    return {
        "state": name,
        "folder": str(output),
        "written": [_entry(one) for one in found.written],
        **{
            word: [{"path": path, "reason": why} for path, why in ones]
            for word, ones in _left_out(found)
        },
    }


def _entry(one: BrowsedEntry) -> dict[str, object]:
    return {
        "path": shown(one.path),
        "kind": one.kind.value,
        "size": one.size,
        "mode": f"{one.mode & 0o7777:04o}",
        "mtime": one.mtime_ns / 1e9,
    }

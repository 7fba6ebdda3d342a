"""Options that say what a state has to pass, and the words with which another command asks it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.exploring import TIME_LIMIT_S, Check
from nbdproxy.case.oracles import OracleName
from nbdproxy.oracles.locate import Where

Files = Annotated[
    Path | None,
    typer.Option("--files", metavar="MANIFEST", help="Pass if all these files are whole."),
]
CheckCommand = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="COMMAND",
        help="Pass if this shell command exits with 0, fail with 1, all else is unknown. It looks "
        "at $uri, the state over NBD, or at what is made if the command line names it: $image, a "
        "raw file of the disk; $fs, a raw file of the filesystem alone; $dir, a folder with all "
        "its files (--oracle says who reads them). $part is the partition's number, $mark the "
        "last mark before the cut.",
    ),
]
TimeLimit = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.001, help="What a command may take for a state.")
]


def options_again(
    files: Path | None, check: Check, where: Where, base: Path | None, oracle: OracleName
) -> str:
    """Return the options with which another command asks the same."""
    words = ["--files", str(files)] if check.command is None else ["--check", check.command]
    words += ["--root", where.root] if where.root is not None else []
    words += ["--partition", str(where.partition)] if where.partition is not None else []
    words += [word for told in where.mounts for word in ("--mount", str(told))]
    words += ["--base", str(base)] if base is not None else []
    limit_s = check.time_limit_s
    words += ["--time-limit", f"{limit_s:g}"] if limit_s != TIME_LIMIT_S else []
    words += ["--oracle", oracle.value] if oracle is not OracleName.QUICK else []
    return shlex.join(words)


def option_of_base(base: Path | None) -> str:
    """Return the option that names the image to another command, behind a space; or nothing."""
    return f" --base {shlex.quote(str(base))}" if base is not None else ""

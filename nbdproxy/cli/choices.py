"""Options that several commands have, and what users write as lists, sizes and ranges."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from nbdproxy.errors import UsageError
from nbdproxy.oracles.locate import Where
from nbdproxy.oracles.plans import GivenMount
from nbdproxy.persistence.model import Coverage
from nbdproxy.persistence.modes import CacheMode
from nbdproxy.sizes import parse_size

E = TypeVar("E", bound=Enum)

At = Annotated[
    str | None,
    typer.Option(
        metavar="CUT",
        help="When: end, before-exit, riskiest, seq:N, flush:N, time:12.5s or mark:NAME.",
        show_default="before-exit, of a poweroff end",
    ),
]
Root = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The folder that the manifest's paths begin at.",
        show_default="found by looking for the files",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecordedAs = Annotated[
    CacheMode | None,
    typer.Option(help="The cache mode QEMU had, if it cannot be told from the recording."),
]
Covers = Annotated[
    Coverage,
    typer.Option(help="A flush covers what was completed before it was received, or replied."),
]
Fsyncgate = Annotated[
    bool, typer.Option("--fsyncgate", help="What a failed flush had in hand, no later one saves.")
]
ModeText = Annotated[
    str | None,
    typer.Option("--mode", metavar="MODE,...", help="Cache modes.", show_default="all"),
]
FailureText = Annotated[
    str | None,
    typer.Option("--failure", metavar="FAILURE,...", help="Failures.", show_default="all"),
]
BaseOption = Annotated[
    Path | None,
    typer.Option(metavar="IMAGE", help="The image as it was, if it moved or was copied."),
]

PartitionOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Which partition; 0 is the whole disk.",
        show_default="the one that has the files",
    ),
]


Mounts = Annotated[
    list[str] | None,
    typer.Option(
        "--mount",
        metavar="WHAT:POINT[:ROOT]",
        help="What is mounted where in the guest: a partition by its number, a volume (vg/home), "
        "or a name as in fstab (LABEL=boot); of several recordings RUN or RUN/1; "
        "ROOT is its subvolume or folder. Repeatable.",
        show_default="as the guest's fstab says",
    ),
]


def where_of(root: str | None, partition: int | None, mounts: list[str] | None) -> Where:
    """Return what --root, --partition and --mount say of where files are."""
    told = []
    for text in mounts or ():
        found = re.fullmatch(r"(.+?):(/[^:]*)(?::(.+))?", text)
        if found is None:
            raise UsageError(
                f"--mount: {text!r} does not say what is mounted where; write for example "
                f"--mount 1:/boot or --mount vg/home:/home"
            )
        root_of = found[3] and posixpath.normpath(posixpath.join("/", found[3]))
        point = posixpath.normpath(f"/{found[2].lstrip('/')}")
        told.append(GivenMount(found[1], point, root_of))
    if told and partition is not None:
        raise UsageError("--partition says that all files are on it; drop it, or --mount")
    return Where(root, partition, tuple(told))


def parse_list(text: str | None, choices: type[E], option: str) -> list[E] | None:
    """Return the members of `choices` that "a,b" names; None stays None."""
    if text is None:
        return None
    known = {choice.value: choice for choice in choices}
    return [known[word] for word in parse_words(text, known, option)]


def parse_words(text: str, known: Iterable[str], option: str) -> list[str]:
    """Return the words of "a,b", each of which must be known."""
    known = list(known)
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise UsageError(f"{option}: {word!r} is unknown; choose from {', '.join(known)}")
    if not words:
        raise UsageError(f"{option} is empty; choose from {', '.join(known)}")
    return words


def parse_range(text: str) -> tuple[int, int]:
    """Return the bytes [a, b) that "A-B" names; both may have a unit: 4K-1M."""
    low, dash, high = text.partition("-")
    start, end = parse_size(low), parse_size(high)
    if not dash or start is None or end is None or not 0 <= start < end:
        raise UsageError(f"--range: {text!r} is not a range of bytes; write for example 4K-1M")
    return start, end

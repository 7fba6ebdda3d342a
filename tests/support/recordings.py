"""What a recording says, through the commands that a user has."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.serving import nbdproxy


def state(run: Path, image: Path, *choice: str) -> bytes:
    """The bytes of a state that a recording gives: all that was sent, unless chosen otherwise.

    `image` is what the recording builds on, as it is now.
    """
    out = run.with_suffix(".state")
    nbdproxy("open", run, "--base", image, "--at", "end", *choice, "-o", out)
    return out.read_bytes()


def requests(run: Path) -> list[tuple[object, ...]]:
    """Type, flags, offset, length and error of the requests that a recording has."""
    lines = nbdproxy("log", run, "--type", "write,write-zeroes,trim,flush", "--json").stdout
    told = [json.loads(line) for line in lines.splitlines()]
    return [
        (one["type"], one["flags"], one.get("offset"), one.get("length"), one["error"])
        for one in told
    ]

"""Which processes there are."""

from __future__ import annotations

import os
from pathlib import Path


def processes_with(text: str) -> set[int]:
    """The processes whose command line or environment has a text, without this one."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            said = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in said:
            found.add(int(folder.name))
    return found - {os.getpid()}

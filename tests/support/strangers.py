"""Folders that somebody else could exchange."""

from __future__ import annotations

import os
from pathlib import Path

NOBODY = 65534


def lay_open(folder: Path) -> Path:
    """Let another user have power over a folder: give it away as root, else let all write to it."""
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder.chmod(0o777)
    return folder

"""A folder for one input, in memory where there is one: what readers write, they sync."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = "/dev/shm"
_PLACE = _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else None


@contextmanager
def folder() -> Iterator[Path]:
    """Have an empty folder, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="nbdproxy-fuzz-", dir=_PLACE) as name:
        yield Path(name)

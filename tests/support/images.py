"""Image files with holes, for every test that needs a disk with a past."""

from __future__ import annotations

from pathlib import Path

_GRAIN = 4096


def write_sparse(path: Path, content: bytes) -> Path:
    """Write an image; aligned blocks of 4 KiB that are all zero become holes."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), _GRAIN):
            block = content[at : at + _GRAIN]
            if any(block):
                file.seek(at)
                file.write(block)
    return path

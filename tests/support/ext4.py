"""A small ext4 written through a server in steps, without a guest and without a mount.

`stages` are images of one filesystem: empty, and after each file. `replay_stage` sends the blocks
in which two of them differ, as a guest would that writes the file back.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.nbd_client import WRITE, NbdClient, Op
from tests.support.serving import tool

BLOCK = 4096
SIZE = 8 << 20
FLUSHED, UNFLUSHED = "flushed.bin", "unflushed.bin"


def content(name: str) -> bytes:
    """What a file holds."""
    return random.Random(name).randbytes(50_000)


def stages(folder: Path) -> list[bytes]:
    """Return the images: without files, with FLUSHED, and with UNFLUSHED too."""
    image = folder / "stage"
    with image.open("wb") as file:
        file.truncate(SIZE)
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), image)
    found = [image.read_bytes()]
    for name in (FLUSHED, UNFLUSHED):
        (folder / name).write_bytes(content(name))
        tool("debugfs", "-w", "-R", f"write {folder / name} {name}", image)
        found.append(image.read_bytes())
    image.unlink()
    return found


def replay_stage(client: NbdClient, before: bytes, after: bytes, *, offset: int = 0) -> None:
    """Write the blocks that differ, from an offset on, and wait for the replies."""
    ops = [
        Op(WRITE, offset + at, data=after[at : at + BLOCK])
        for at in range(0, SIZE, BLOCK)
        if before[at : at + BLOCK] != after[at : at + BLOCK]
    ]
    assert not any(reply.error for reply in client.do(*ops))

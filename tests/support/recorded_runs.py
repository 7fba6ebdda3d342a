"""Recordings of nbdsh at work on an image with data and holes, and what their states hold."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nbdproxy.crash.states.naming import parse_state_id
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from tests.support.images import write_sparse
from tests.support.serving import Server
from tests.support.shell import nbdsh

MIB = 1 << 20
SIZE = 4 * MIB
SCRIPT = """
import random
dice = random.Random(7)
other = nbd.NBD()
other.connect_uri(h.get_uri())
for n in range(150):
    use, at = dice.choice((h, other)), 512 * dice.randrange(3000)
    length = 512 * dice.choice((1, 1, 3, 8, 8, 200))
    fua = dice.choice((0, 0, nbd.CMD_FLAG_FUA))
    what = dice.randrange(8)
    if what < 5:
        use.pwrite(dice.randbytes(length), at, fua)
    elif what == 5:
        use.zero(length, at, dice.choice((0, nbd.CMD_FLAG_NO_HOLE)))
    elif what == 6:
        use.trim(length, at)
    else:
        use.flush()
for n in range(8):
    h.aio_pwrite(bytearray(b"%4095d\\n" % n), 4096 * n)
h.poll(0)
tell(None)
"""
STATES = [
    *(f"s{at}.{level}.{choice}" for at in (70, 160, 240)
      for level in ("received", "flushed", "completed") for choice in ("must", "all")),
    *(f"s{at}.flushed.draw3-{number}" for at in (70, 160, 240) for number in range(8)),
    "s240.nothing.must",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A recording, its image, and the digest of each of its states."""

    folder: Path
    run: Path
    image: Path
    states: dict[str, str]

    def copy(self, to: Path) -> Path:
        """Copy all of it, with its times; return the recording. It still names this image."""
        return Path(shutil.copytree(self.run, to / self.run.name))


def digest(content: bytes) -> str:
    """Tell contents apart."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def states_of(run: Path, image: Path | None = None) -> dict[str, str]:
    """The digest of what the disk holds in each of STATES."""
    found = {}
    with closing(RecordedSource(run, image=image)) as source:
        for state in STATES:
            with closing(open_state(source, parse_state_id(state))) as disk:
                found[state] = digest(disk.pread(0, disk.size))
    return found


def make(folder: Path, *options: str, kill: bool = False) -> Run:
    """Record nbdsh at work on an image with data and holes."""
    dice = Random(5)
    pieces = [dice.randbytes(65536) if dice.random() < 0.6 else bytes(65536) for _ in range(64)]
    image = write_sparse(folder / "image", b"".join(pieces))
    run = folder / "run1"
    with Server(image, "--record", run, *options) as server:
        nbdsh(SCRIPT, uri=server.uri)
        if kill:
            server.kill()
        else:
            assert server.stop() == 0
    return Run(folder, run, image, states_of(run))

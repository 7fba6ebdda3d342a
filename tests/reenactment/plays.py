"""Recordings from above qcow2 files, and what a guest finds in the files that a play leaves."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.disks.copying import write_sparse
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.reader import Recording
from nbdproxy.reenactment.reenact import PlaySource, reenact
from nbdproxy.reenactment.result import FileSource, Reenacted
from tests.reenactment.images import CLUSTER, DATA_FILE, SIZE, guests
from tests.support.nbd_client import FLUSH, FUA, TRIM, WRITE, ZERO, NbdClient, Op
from tests.support.proxies import Proxy

_WEIGHTS = {WRITE: 70, ZERO: 10, TRIM: 8, FLUSH: 6}


@dataclass(frozen=True)
class Recorded:
    """What a guest did to a qcow2 file, the file and its data file as they were, and its view."""

    folder: Path
    run: Path
    image: Path
    data_file: Path | None
    raw: Path

    def play(self, mode: CacheMode, *, cuts: Iterable[int] = (), name: str = "") -> Reenacted:
        """Play it for a cache mode."""
        with Recording(self.run) as recording:
            played = PlaySource(recording, self.image, self.data_file)
            return reenact(played, mode, self.folder / (name or mode.value), cuts=cuts)

    def above(self, cut: int, level: Level) -> bytes:
        """What is on the guest's disk for certain, by the rules for raw disks."""
        with closing(RecordedSource(self.run, image=self.raw)) as source:
            return _content(
                source, StateId(cut, level, Choice.MUST), self.folder / "state"
            ).read_bytes()

    def below(self, played: Reenacted, positions: Sequence[int], level: Level) -> bytes:
        """What a guest finds in the files that are there for certain at these positions."""
        return guests(*self.files(played, positions, level))

    def files(self, played: Reenacted, positions: Sequence[int], level: Level) -> list[Path]:
        """The files that are there for certain at positions, in the folder of the image."""
        made = []
        images = (self.image, self.data_file)
        for name, image, position in zip(played.files, images, positions, strict=False):
            assert image is not None
            with closing(FileSource(played.recording(name), image)) as source:
                state = StateId(position, level, Choice.MUST)
                made.append(_content(source, state, self.image.parent / f"left-{name}"))
        return made

    def ends(self, played: Reenacted) -> list[int]:
        """The positions at which QEMU had ended in order."""
        images = (self.image, self.data_file)
        found = []
        for name, image in zip(played.files, images, strict=False):
            assert image is not None
            with closing(FileSource(played.recording(name), image)) as source:
                found.append(source.events)
        return found


def _content(source: RecordedSource, state: StateId, path: Path) -> Path:
    with closing(open_state(source, state)) as disk, path.open("w+b") as file:
        write_sparse(disk, file.fileno())
    return path


def record(image: Path, work: Callable[[NbdClient], None], *options: str | Path) -> Recorded:
    """Record a guest's work on an image, after copies of it and its data file are made."""
    folder = image.parent
    before = Path(shutil.copy(image, folder / "before.qcow2"))
    data = folder / "before.data" if (folder / DATA_FILE).exists() else None
    if data is not None:
        shutil.copy(folder / DATA_FILE, data)
    raw, run = folder / "before.raw", folder / "above"
    raw.write_bytes(guests(image))
    with Proxy(folder / "proxy", image, "--format", "qcow2", "--record", run, *options) as proxy:
        with proxy.client() as client:
            work(client)
        assert proxy.stop() == 0
    return Recorded(folder, run, before, data, raw)


class Workload:
    """Random requests, some of them in flight together, on places that are near each other."""

    def __init__(self, seed: int, *, bursts: int = 40) -> None:
        self._dice = random.Random(seed)
        self._bursts = bursts

    def __call__(self, client: NbdClient) -> None:
        """Send bursts, and wait for all answers or for some before the next; sync now and then."""
        dice = self._dice
        for _ in range(self._bursts):
            client.send(*(self._op() for _ in range(dice.choice((1, 1, 2, 5, 12)))))
            left = dice.choice((0, 0, 0, 3, 10))
            while len(client.waiting) > left:
                assert not client.receive()[1].error
            if dice.random() < 0.2:
                while client.waiting:
                    assert not client.receive()[1].error
                client.flush()

    def _op(self) -> Op:
        dice = self._dice
        (command,) = dice.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        if command == FLUSH:
            return Op(FLUSH)
        grain = CLUSTER if command == TRIM or dice.random() < 0.3 else 512
        length = grain * dice.choice((1, 1, 2) if grain > 512 else (1, 8, 8, 24, 200))
        offset = dice.randrange((SIZE // 2 - length) // grain + 1) * grain
        offset += dice.choice((0, 0, SIZE // 2))
        flags = FUA if command != TRIM and dice.random() < 0.05 else 0
        if command == WRITE:
            return Op(WRITE, offset, data=dice.randbytes(length), flags=flags)
        return Op(command, offset, length, flags=flags)


def flushed_cuts(run: Path) -> list[int]:
    """The cuts right behind an answered flush."""
    with Recording(run) as recording:
        table = recording.table
        answered = table.is_flush & (table.completed != NEVER)
        return [int(position) + 1 for position in table.completed[answered]]

"""A QEMU that is really killed leaves what the play for its cache mode says, on an image file."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import THROUGH, CacheMode
from tests.reenactment.images import CLUSTER, KINDS, SIZE, guests
from tests.reenactment.plays import Recorded, record
from tests.support.nbd_client import FLUSH, TRIM, WRITE, ZERO, NbdClient, Op

_PROMPT = b"qemu-io> "


class Step(NamedTuple):
    """One request; a WRITE's data is all `value`."""

    command: int
    offset: int = 0
    length: int = 0
    value: int = 0

    def op(self) -> Op:
        """The request for an NBD server."""
        if self.command == WRITE:
            return Op(WRITE, self.offset, data=bytes([self.value]) * self.length)
        return Op(self.command, self.offset, self.length)

    def words(self) -> str:
        """The same for qemu-io."""
        where = f"{self.offset} {self.length}"
        return {
            WRITE: f"write -P {self.value} {where}",
            ZERO: f"write -z -u {where}",
            TRIM: f"discard {where}",
            FLUSH: "flush",
        }[self.command]


def _one_by_one(steps: Sequence[Step]) -> Callable[[NbdClient], None]:
    def work(client: NbdClient) -> None:
        for step in steps:
            (reply,) = client.do(step.op())
            assert not reply.error

    return work


def _qemu_killed(recorded: Recorded, mode: CacheMode, steps: Sequence[Step]) -> bytes:
    """What a guest finds on a copy of the image when a QEMU that did all steps was killed."""
    image = Path(shutil.copy(recorded.image, recorded.image.with_name("killed.qcow2")))
    node = f"driver=qcow2,file.driver=file,file.filename={image}"
    data_file = None
    if recorded.data_file is not None:
        data_file = Path(shutil.copy(recorded.data_file, image.with_suffix(".data")))
        node += f",data-file.driver=file,data-file.filename={data_file}"
    command = ("qemu-io", "-t", mode.value, "-d", "unmap", "--image-opts", node)
    with subprocess.Popen(
        ("stdbuf", "-o0", *command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _answer(process.stdout.fileno())
            for step in steps:
                if step.command == FLUSH and mode in THROUGH:
                    continue  # its guest sees no cache
                process.stdin.write(step.words().encode() + b"\n")
                said = _answer(process.stdout.fileno()).lower()
                assert b"failed" not in said, said
                assert b"error" not in said, said
        finally:
            process.kill()
    return guests(image, data_file)


def _answer(out: int) -> bytes:
    said = b""
    while not said.endswith(_PROMPT):
        part = os.read(out, 4096)
        assert part, said
        said += part
    return said


def _left_by_the_play(recorded: Recorded, mode: CacheMode) -> bytes:
    played = recorded.play(mode)
    return recorded.below(played, played.positions[-1].tolist(), Level.COMPLETED)


def test_what_was_written_where_nothing_was_and_never_flushed(tmp_path: Path) -> None:
    """The first user's files: zeroes under none, and whole under writethrough."""
    steps = [Step(WRITE, at * 65536, 65536, 1) for at in range(4)]
    steps += [Step(FLUSH), *(Step(WRITE, at * 65536, 65536, 2) for at in range(4, 64))]
    recorded = record(KINDS["new"](tmp_path), _one_by_one(steps))
    for mode in CacheMode:
        left = _left_by_the_play(recorded, mode)
        files = {left[at : at + 65536] for at in range(4 * 65536, 64 * 65536, 65536)}
        assert left[: 4 * 65536] == b"\1" * (4 * 65536)
        assert files == {(b"\2" if mode in THROUGH else b"\0") * 65536}
        assert left == _qemu_killed(recorded, mode, steps)


def _some(seed: int) -> list[Step]:
    """Random steps, none of which is the flush that would end them."""
    dice = random.Random(seed)
    steps = []
    for _ in range(60):
        (command,) = dice.choices((WRITE, ZERO, TRIM, FLUSH), (70, 10, 10, 6))
        grain = CLUSTER if command == TRIM or dice.random() < 0.5 else 512
        length = grain * dice.choice((1, 1, 1, 2) if grain > 512 else (1, 8, 8, 20, 200))
        offset = dice.randrange((SIZE - length) // grain + 1) * grain
        where = (0, 0) if command == FLUSH else (offset, length)
        steps.append(Step(command, *where, dice.randrange(1, 256)))
    return [*steps, Step(WRITE, 0, 512, 7)]


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("new", 1), ("on-backing-file", 2), ("snapshot", 3), ("zlib", 4), ("data-file", 5)],
)
def test_a_killed_qemu_leaves_what_the_play_says(kind: str, seed: int, tmp_path: Path) -> None:
    image, steps = KINDS[kind](tmp_path), _some(seed)
    recorded = record(image, _one_by_one(steps))
    for mode in CacheMode:
        assert _left_by_the_play(recorded, mode) == _qemu_killed(recorded, mode, steps), mode

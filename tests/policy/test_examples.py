"""Every policy's examples are true: each is run through the real `Export` on a disk in memory.

Each step is a batch of its own and is answered before the next. What becomes of a session, of
QEMU's monitor and of signals is in tests/interop; here their events only reach the export.
"""

from __future__ import annotations

import pytest
import trio

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.examples import Example, Step, parse_step
from nbdproxy.policy.loader import load, names
from nbdproxy.policy.model import CutEvent, Policy
from nbdproxy.requests import Command, CommandFlag, Request
from nbdproxy.server.export import Export

SECTOR = 512
SECTORS = 4
STORIES = [
    (name, number, example)
    for name in names()
    for number, example in enumerate(load(name).examples)
]


def request(step: Step) -> Request:
    """The request of a step."""
    assert step.command is not None
    flags = CommandFlag.FUA if step.fua else 0
    if step.command is Command.FLUSH:
        return Request(step.command, flags, 1, 0, 0, memoryview(b""))
    letters = step.letter.encode() * SECTOR if step.command is Command.WRITE else b""
    return Request(
        step.command, flags, 1, step.sector * SECTOR, SECTOR, memoryview(bytearray(letters))
    )


async def tell(export: Export, steps: tuple[Step, ...]) -> None:
    """Run a story, and end in order if the power did not go."""
    for step in steps:
        if step.command is None:
            if not export.power.off and export.cuts_at(CutEvent(step.event)):
                export.power.cut(step.event)
                await export.cut()
            continue
        replies = Replies()
        jobs = export.handle(1, [request(step)], replies)
        answers = len(replies.take())
        for job in jobs:
            answers += await export.finish(1, job, replies)
        assert answers == (0 if export.power.off else 1)
    if not export.power.off:
        export.sync()


def ends_as(policy: Policy, steps: tuple[Step, ...]) -> tuple[str, ...]:
    """The letter of each sector of the image at the end."""
    image = MemoryDisk(b"-" * SECTORS * SECTOR)

    async def main() -> None:
        await tell(Export("", image, policy), steps)

    trio.run(main)
    sectors = [image.pread(n * SECTOR, SECTOR) for n in range(SECTORS)]
    assert all(sector == sector[:1] * SECTOR for sector in sectors)
    return tuple(sector[:1].decode().replace("\x00", "0") for sector in sectors)


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, _, example in STORIES],
    ids=[f"{name}-{number}" for name, number, _ in STORIES],
)
def test_the_image_ends_as_the_example_says(name: str, example: Example) -> None:
    assert len(example.image) == SECTORS
    assert ends_as(load(name).policy, example.steps) == example.image


@pytest.mark.parametrize("name", names())
def test_every_policy_has_examples(name: str) -> None:
    assert load(name).examples


@pytest.mark.parametrize("name", names())
def test_every_policy_that_cuts_has_an_example_of_a_cut(name: str) -> None:
    file = load(name)
    events = {step.event for example in file.examples for step in example.steps}
    assert not file.policy.cut_at or events & {event.value for event in file.policy.cut_at}


def test_a_wrong_example_is_noticed() -> None:
    steps = tuple(parse_step(text, "") for text in ("write 0 A", "exit"))
    assert ends_as(load("drop-unflushed").policy, steps) == ("-", "-", "-", "-")
    assert ends_as(load("passthrough").policy, steps) == ("A", "-", "-", "-")

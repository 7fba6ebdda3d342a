"""Requests that came under one policy and are finished under another, step by step.

What a real load sees of changes is in tests/laws/test_cut_policies.py; the commands in
test_control.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import ImageError
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.compose import load_all
from nbdproxy.policy.model import Policy
from nbdproxy.requests import Command, CommandFlag, Request
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.export.jobs import Job
from nbdproxy.server.export.places import find_places

SECTOR = 512


def request(command: Command, letter: str = "", flags: int = 0) -> Request:
    length = 0 if command is Command.FLUSH else SECTOR
    payload = memoryview(bytearray(letter.encode() * SECTOR))
    return Request(command, flags, 1, 0, length, payload)


def ask(export: Export, *requests: Request) -> list[Job]:
    return export.handle(1, requests, Replies())


def exported(disk: MemoryDisk, policy: Policy) -> Export:
    return Export("", ImageStore(disk), policy, places=find_places(policy, disk))


def play(policy: str, story: Callable[[Export, MemoryDisk], Awaitable[None]]) -> None:
    async def main() -> None:
        disk = MemoryDisk(b"-" * 4 * SECTOR)
        await story(exported(disk, load_all([policy])), disk)

    trio.run(main)


async def finish(export: Export, jobs: list[Job]) -> int:
    """Finish jobs; return how many said that all is well."""
    told = 0
    for job in jobs:
        replies = Replies()
        assert await export.finish(1, job, replies)
        (reply,) = replies.take()
        told += bytes(reply[4:8]) == bytes(4)
    return told


POLICIES = ["passthrough", "drop-unflushed", "gluster-write-behind", "lying-flush"]


@pytest.mark.parametrize("first", POLICIES)
@pytest.mark.parametrize("second", POLICIES)
def test_a_flush_and_fua_in_between(first: str, second: str) -> None:
    async def story(export: Export, disk: MemoryDisk) -> None:
        jobs = ask(export, request(Command.WRITE, "A"))
        jobs += ask(export, request(Command.FLUSH))
        jobs += ask(export, request(Command.WRITE, "B", CommandFlag.FUA))
        await export.change_policy(load_all([second]), 0)
        assert disk.pread(0, 1) == b"B"
        held = ask(export, request(Command.WRITE, "C"))
        assert await finish(export, jobs) == len(jobs)
        await finish(export, held)
        # What came under the second policy is not destaged by a flush of the first.
        holds = second != "passthrough"
        assert disk.pread(0, 1) == (b"B" if holds else b"C")

    play(first, story)


@pytest.mark.parametrize("first", POLICIES)
def test_a_read_in_between_reads_what_is_there_now(first: str) -> None:
    async def story(export: Export, _disk: MemoryDisk) -> None:
        await finish(export, ask(export, request(Command.WRITE, "A")))
        job = Job(request(Command.READ))
        await export.change_policy(load_all(["drop-unflushed"]), 0)
        await finish(export, ask(export, request(Command.WRITE, "B")))
        replies = Replies()
        await export.finish(1, job, replies)
        assert b"".join(replies.take())[16:] == b"B" * SECTOR

    play(first, story)


def test_a_flush_that_failed_is_told_under_the_next_policy() -> None:
    async def story(export: Export, disk: MemoryDisk) -> None:
        await finish(export, ask(export, request(Command.WRITE, "A")))
        jobs = ask(export, request(Command.FLUSH))
        await export.change_policy(load_all(["passthrough"]), 0)
        assert await finish(export, jobs) == 0
        assert disk.pread(0, 1) == b"A"  # the change of policy made it durable

    play("fsyncgate", story)


class Broken(MemoryDisk):
    """A disk that cannot be synced."""

    def sync(self) -> None:
        raise OSError(5, "Input/output error")


def test_a_pause_that_fails_is_told_and_leaves_nothing_paused() -> None:
    async def main() -> None:
        export = exported(Broken(4 * SECTOR), load_all(["drop-unflushed"]))
        await finish(export, ask(export, request(Command.WRITE, "A")))
        with pytest.raises(ImageError, match="what is held cannot be made durable: Input/output"):
            await export.pause()
        assert not export.paused
        with pytest.raises(ImageError):
            await export.change_policy(load_all(["passthrough"]), 0)
        assert export.policy.name == "drop-unflushed"
        assert not export.paused

    trio.run(main)


def test_a_cut_while_a_pause_waits_lands_nothing() -> None:
    async def main() -> None:
        disk = MemoryDisk(b"-" * 4 * SECTOR)
        export = exported(disk, load_all(["drop-unflushed", "slow-disk"], ["delay_s=1"]))
        await finish(export, ask(export, request(Command.WRITE, "A")))
        late = ask(export, request(Command.WRITE, "B"))

        async def pause() -> None:
            with pytest.raises(ImageError, match="the power went meanwhile"):
                await export.pause()

        async with trio.open_nursery() as nursery:
            for job in late:
                nursery.start_soon(export.finish, 1, job, Replies())
            nursery.start_soon(pause)
            await trio.testing.wait_all_tasks_blocked()
            export.power.cut("now")
        assert disk.pread(0, 1) == b"-"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

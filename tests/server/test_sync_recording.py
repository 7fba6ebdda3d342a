"""`--sync-recording`: no flush and no FUA write is answered before the record of it is durable.

What `RecordingWriter.sync` makes durable is in tests/attacks/test_power_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import RecordingError
from nbdproxy.nbd.replies import Replies
from nbdproxy.policy.compose import load_all
from nbdproxy.recording.format import SLOT_SIZE
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.meta import Ending
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command, CommandFlag, NbdErrno, Request
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.export.places import find_places
from tests.recording.example import META
from tests.support.serving import Server, nbdproxy

POLICIES = ["passthrough", "drop-unflushed", "lying-flush", "unsafe", "gluster-write-behind"]


def request(command: Command, flags: int = 0) -> Request:
    length = 0 if command is Command.FLUSH else 512
    return Request(command, flags, 1, 0, length, memoryview(bytes(length)))


class Watched(RecordingWriter):
    """A recording that knows up to where it was synced, and may refuse to be."""

    synced = 0
    broken = False

    def sync(self) -> None:
        """Sync."""
        if self.broken:
            raise RecordingError("the recording cannot be made durable: no spoon")
        seq = self.seq
        super().sync()
        self.synced = seq


async def answers(export: Export, *requests: Request) -> list[tuple[int, int]]:
    """Return the error of each answer, and up to where the recording was synced then."""
    assert isinstance(export.recorder, Watched)
    found = []
    replies = Replies()
    jobs = export.handle(1, requests, replies)
    for wait in (None, *jobs):
        if wait is not None:
            replies = Replies()
            assert await export.finish(1, wait, replies)
        for reply in replies.take():
            found.append((int.from_bytes(bytes(reply[4:8]), "big"), export.recorder.synced))
    return found


def play(tmp_path: Path, policy: str, story: Callable[[Export], object]) -> None:
    async def main() -> None:
        recorder = Watched(tmp_path / "run", META, durable=True)
        disk, rules = MemoryDisk(bytes(4096)), load_all([policy])
        export = Export(
            "", ImageStore(disk), rules, recorder=recorder, places=find_places(rules, disk)
        )
        await story(export)  # type: ignore[misc]
        recorder.close(Ending("done", None))

    trio.run(main)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("asked", ["flush", "fua"])
def test_it_is_answered_when_the_recording_is_durable(
    tmp_path: Path, policy: str, asked: str
) -> None:
    promise = (
        request(Command.FLUSH) if asked == "flush" else request(Command.WRITE, CommandFlag.FUA)
    )

    async def story(export: Export) -> None:
        assert [error for error, _ in await answers(export, request(Command.WRITE))] == [0]
        for _ in range(3):
            recorder = export.recorder
            assert isinstance(recorder, Watched)
            ((error, synced),) = await answers(export, promise)
            assert (error, synced) == (0, recorder.seq)

    play(tmp_path, policy, story)
    with Recording(tmp_path / "run") as found:
        assert (found.table.completed != NEVER).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_where_it_cannot_be_durable_nothing_succeeds_any_more(tmp_path: Path, policy: str) -> None:
    async def story(export: Export) -> None:
        assert isinstance(export.recorder, Watched)
        export.recorder.broken = True
        assert [error for error, _ in await answers(export, request(Command.FLUSH))] == [
            NbdErrno.ENOSPC
        ]
        export.recorder.broken = False  # the kernel tells such an error once
        for promise in (request(Command.FLUSH), request(Command.WRITE)):
            assert [error for error, _ in await answers(export, promise)] == [NbdErrno.ENOSPC]
        assert export.failure is not None
        assert "no spoon" in str(export.failure)

    play(tmp_path, policy, story)


def test_serve_takes_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with Server(image, "--record", tmp_path / "run", "--sync-recording") as server:
        client = server.client()
        client.write(0, b"x" * 4096)
        client.flush()
        left = tmp_path / "run" / "events"
        client.disc()
        assert server.stop() == 0
    assert left.stat().st_size % SLOT_SIZE == 0
    told = nbdproxy("serve", image, "--sync-recording", code=2).stderr
    assert "add --record DIR, or drop it" in told

"""A guest that fails, or whose disk does, tells nothing of a state; the next state gets another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread, Timer

import pytest

from nbdproxy.checker.guest import AgentPort, CheckerGuest, GuestError
from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.lab.guest import accel
from nbdproxy.lab.guest.disk import format_disk
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import ONLY
from tests.support.serving import until
from tests.support.states import files, opened

CONTENT = bytes(range(1, 251)) * 80
SIZE = 32 << 20
LIMIT_S = 5.0


@contextmanager
def agent(answer: Callable[[dict[str, object]], bytes]) -> Iterator[AgentPort]:
    """A port whose other end gives, to each command, some bytes."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, theirs.makefile("rb") as lines:
            for line in lines:
                theirs.sendall(answer(json.loads(line)))

    thread = Thread(target=serve)
    thread.start()
    try:
        yield AgentPort(ours, lambda: 0.0)
    finally:
        ours.close()
        thread.join()


def said(**more: object) -> Callable[[dict[str, object]], bytes]:
    """An answer that is right but for some of it."""

    def answer(command: dict[str, object]) -> bytes:
        right = {"number": command["number"], "log": ["EXT4-fs: all is well"], "found": {"a": 1}}
        return json.dumps({**right, **more}).encode() + b"\n"

    return answer


def test_an_answer_to_the_command_is_taken() -> None:
    with agent(said()) as port:
        assert [port.ask("hello", LIMIT_S) for _ in range(2)] == [{"a": 1}] * 2
        assert port.said == ["EXT4-fs: all is well"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (said(number=7), "out of step: answer 7 to command 1"),
        (said(number=None), "out of step"),
        (said(found=None, failed="Error: ENOTCONN"), "could not hello: Error: ENOTCONN"),
        (lambda _: b"{\n", "is none"),
        (lambda _: b"[1]\n", "is none"),
        (lambda _: b"\xff\n", "is none"),
        (lambda _: b"[" * 100_000 + b"\n", "is none"),
        (said(log=["x", "BUG: kernel NULL pointer dereference"]), "stumbled: BUG: kernel NULL"),
        (said(log=["INFO: task node:77 blocked for more than 120 seconds."]), "stumbled: INFO"),
        (said(log=["I/O error, dev vdb, sector 8 op 0x0:(READ)"]), "stumbled: I/O error"),
    ],
)
def test_what_is_no_answer_to_the_command_is_an_error(
    answer: Callable[[dict[str, object]], bytes], words: str
) -> None:
    with agent(answer) as port, pytest.raises(GuestError, match=words):
        port.ask("hello", LIMIT_S)


@pytest.mark.parametrize("most", [1 << 20, None])
def test_an_answer_without_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    """For its length; or, however long it may be, when its time is over."""
    if most is not None:
        monkeypatch.setattr("nbdproxy.checker.guest._ANSWER_MAX", most)
    ours, theirs = socket.socketpair()

    def flood() -> None:
        with suppress(OSError):
            while True:
                theirs.sendall(b"x" * 4096)
                time.sleep(0.001)

    thread = Thread(target=flood)
    with theirs:
        with ours:
            thread.start()
            port = AgentPort(ours, lambda: 0.0)
            with pytest.raises(TimeoutError if most is None else GuestError):
                port.ask("hello", 0.5 if most is None else 60)
        thread.join()


def test_a_late_answer_is_not_taken_for_the_next_one() -> None:
    """It comes when the second command was sent."""
    seen: list[bytes] = []

    def late(command: dict[str, object]) -> bytes:
        seen.append(said()(command))
        return b"" if len(seen) == 1 else seen[0]

    with agent(late) as port:
        with pytest.raises(TimeoutError):
            port.ask("hello", 0.1)
        with pytest.raises(GuestError, match="out of step: answer 1 to command 2"):
            port.ask("hello", LIMIT_S)


def test_time_without_a_processor_does_not_count() -> None:
    """Starved for a second each time that somebody looks, it has all the time it needs."""
    asked = iter(range(1000))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        port = AgentPort(ours, lambda: float(next(asked)))
        timer = Timer(0.6, lambda: theirs.sendall(said()({"number": 1})))
        timer.start()
        assert port.ask("hello", 0.2) == {"a": 1}
        timer.join()


def test_what_wants_a_processor_and_has_none_is_starved() -> None:
    busy = ["taskset", "-c", "0", "sh", "-c", "while :; do :; done"]
    with ExitStack() as stack:
        pair, sleeper = (
            [subprocess.Popen(busy) for _ in range(2)],
            subprocess.Popen(["sleep", "60"]),
        )
        for process in (*pair, sleeper):
            stack.callback(process.wait)
            stack.callback(process.kill)
        until(lambda: sum(map(accel.starved_s, pair)) > 0.4, "they wait for each other")
        assert accel.starved_s(sleeper) < 0.4
    assert accel.starved_s(sleeper) == 0


@pytest.fixture
def disk(tmp_path: Path) -> OverlayDisk:
    """An ext4 that holds /a."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a").write_bytes(CONTENT)
    format_disk(tmp_path / "image", SIZE, options=["-d", str(tmp_path / "root")])
    return opened(tmp_path / "image")


MANIFEST: Manifest = files(a=CONTENT)


def judged(kernel: KernelOracle, disk: OverlayDisk) -> Findings:
    return kernel.prepare_check(MANIFEST, earlier={}, mount=ONLY).check(disk, None)


class FailingDisk(OverlayDisk):
    """A disk that cannot be read in one place."""

    bad = -1

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        if offset <= self.bad < offset + len(buffer):
            raise OSError(5, "the host's disk is broken")
        super().pread_into(offset, buffer)


@pytest.mark.lab
def test_a_place_that_cannot_be_read_here_is_no_unreadable_file(
    kernel: KernelOracle, disk: OverlayDisk
) -> None:
    filesystem = Filesystem(disk)
    node = filesystem.lookup(b"/a")
    assert node is not None
    failing = FailingDisk(disk)
    failing.bad = filesystem.runs(node)[0].physical * filesystem.superblock.block_size
    found = judged(kernel, failing)
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert "could not be read here" in str(found.reason) and "disk is broken" in str(found.reason)
    assert judged(kernel, disk).verdict is Verdict.PASS


def stop(guest: CheckerGuest) -> None:
    os.killpg(guest.process.pid, signal.SIGSTOP)
    with pytest.raises(GuestError, match="did not answer within 1 s"):
        guest.ask("hello", limit_s=1)


def crash(guest: CheckerGuest) -> None:
    with pytest.raises(GuestError, match="gone"):
        guest.ask("fsck", argv=["sh", "-c", "echo c > /proc/sysrq-trigger"])


def leave_mounted(guest: CheckerGuest) -> None:
    guest.ask("fsck", argv=["sh", "-c", "mount -t ext4 /dev/vdb1 /mnt"])


@pytest.mark.lab
@pytest.mark.parametrize("strike", [stop, crash, leave_mounted])
def test_a_guest_that_fails_is_unknown_and_the_next_state_gets_another(
    kernel: KernelOracle, disk: OverlayDisk, strike: Callable[[CheckerGuest], None]
) -> None:
    with kernel.mounted(kernel.place(disk, None)) as guest:
        pass
    strike(guest)
    found = judged(kernel, disk)
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert found.reason is not None and "the checker guest" in found.reason
    assert judged(kernel, disk).verdict is Verdict.PASS
    with kernel.mounted(kernel.place(disk, None)) as another:
        assert another is not guest

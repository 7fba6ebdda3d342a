"""What a test starts dies with it, whoever ends the test run and however."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import processes_with
from tests.support.serving import until

ROOT = Path(__file__).resolve().parent.parent.parent

PRELUDE = """
import subprocess, time
from pathlib import Path
from tests.support import fork_server, lower
from tests.support.qemu import Qemu
from tests.support.serving import Server, tool

def test_that_hangs(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
"""

DAEMON = """
    tool("nbdkit", "-U", tmp_path / "nbdkit.socket", "memory", "1M")
"""

EVERYTHING = """
    server = Server(image, "--socket", tmp_path / "ours")
    fork_server.shared().start(
        ["serve", str(image), "--read-only", "--socket", str(tmp_path / "forked")],
        tmp_path / "out", tmp_path / "err",
    )
    ours = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in ours:  # an image for each, as each locks its own
        folder.mkdir()
        (folder / "image").write_bytes(bytes(1 << 20))
    kept = [start(own, own / "image") for start, own in zip(lower.KINDS.values(), ours)]
    tool("qemu-nbd", "--fork", "-t", "--read-only", "-f", "raw", "-k", tmp_path / "s1", image)
    tool(
        "qemu-storage-daemon", "--daemonize",
        "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/s2",
    )
    qemu = Qemu(tmp_path, tmp_path / "ours")
    subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1; done"])
"""

HANG = """
    Path({ready!r}).touch()
    time.sleep(600)
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short name: sockets lie deep below it, and their paths may not be long."""
    with tempfile.TemporaryDirectory(prefix="left-") as name:
        yield Path(name)


def run(folder: Path, body: str, *options: str) -> subprocess.Popen[bytes]:
    """A test run of one test that starts things and then hangs; returns when it does."""
    test, ready = folder / "test_one.py", folder / "ready"
    test.write_text(PRELUDE + body + HANG.format(ready=str(ready)))
    words = ["-p", "no:cacheprovider", "-p", "tests.conftest", "--basetemp", str(folder / "t")]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *words, *options, str(test)],
            cwd=ROOT,
            env={**os.environ, "SCRATCH": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        until(lambda: ready.exists() or process.poll() is not None, "the test hangs", 120)
        assert process.poll() is None, (folder / "said").read_text()
    except BaseException:
        process.kill()
        raise
    return process


def assert_nothing_left(folder: Path) -> None:
    until(lambda: not processes_with(str(folder)), "all that it started is gone")


def test_a_killed_run_leaves_no_server_of_any_kind(scratch: Path) -> None:
    with run(scratch, DAEMON + EVERYTHING) as process:
        until(lambda: len(processes_with(str(scratch))) >= 13, "all are there")
        process.kill()
    assert_nothing_left(scratch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_leaves_nothing(scratch: Path, number: int) -> None:
    with run(scratch, DAEMON) as process:
        until(lambda: len(processes_with(str(scratch))) >= 3, "all are there")
        process.send_signal(number)
    assert_nothing_left(scratch)


def test_a_worker_that_is_killed_leaves_nothing_while_the_run_goes_on(scratch: Path) -> None:
    note = "    Path({!r}).write_text(str(__import__('os').getpid()))\n".format(
        str(scratch / "pid")
    )
    with run(scratch, DAEMON + note, "-n", "1", "--maxfail=1") as process:
        daemons = processes_with(str(scratch / "t"))
        assert daemons
        os.kill(int((scratch / "pid").read_text()), signal.SIGKILL)
        until(lambda: not daemons & processes_with(str(scratch / "t")), "the daemon is gone")
        process.kill()
    assert_nothing_left(scratch)


def test_a_killed_run_leaves_no_workers(scratch: Path) -> None:
    with run(scratch, DAEMON, "-n", "1") as process:
        process.kill()
    assert_nothing_left(scratch)


def test_a_test_that_takes_too_long_leaves_nothing(scratch: Path) -> None:
    with run(scratch, DAEMON, "--timeout=2", "--timeout-method=thread") as process:
        process.wait(60)
    assert_nothing_left(scratch)

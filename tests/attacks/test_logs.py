"""A log, or a reader of results, that fails: it ends no disk, and changes no exit code.

Not covered: a file on a network filesystem that hangs.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from structlog.testing import capture_logs

from nbdproxy.server.shared.complaints import Complaints
from tests.support.fork_server import shared
from tests.support.nbd_client import NbdClient
from tests.support.proxies import Proxy
from tests.support.serving import COMMAND, DEADLINE_S, nbdproxy

SIZE = 64 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


@contextmanager
def serving(image: Path, stderr: Path) -> Iterator[Proxy]:
    """A server on `proxy/socket` beside the image, which records to `run` there."""
    folder = image.parent / "proxy"
    folder.mkdir()
    (folder / "err").symlink_to(stderr)
    with Proxy(folder, image, "--record", image.parent / "run") as server:
        yield server


@contextmanager
def pipe(folder: Path, size: int = 65536) -> Iterator[IO[bytes]]:
    """A FIFO named `fifo`, and its reading end, which does not wait."""
    os.mkfifo(folder / "fifo")
    reading = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, size)
    with os.fdopen(reading, "rb") as stream:
        yield stream


def stray(image: Path, count: int = 1) -> None:
    """Knock as a web browser would: each time is a line of the log."""
    for _ in range(count):
        with socket.socket(socket.AF_UNIX) as knock:
            knock.connect(str(image.parent / "proxy" / "socket"))
            knock.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(64))
            while knock.recv(4096):
                pass


def assert_serves(image: Path, letter: bytes) -> None:
    with NbdClient.at(image.parent / "proxy" / "socket") as client:
        client.write(0, letter * 512)
        client.flush()


def assert_ends_in_order(server: Proxy, image: Path, letter: bytes) -> None:
    assert server.stop() == 0
    assert image.read_bytes()[:512] == letter * 512
    assert "ended by SIGTERM" in nbdproxy("info", image.parent / "run").stdout


def test_a_reader_of_the_log_that_goes_ends_nothing(image: Path, tmp_path: Path) -> None:
    with pipe(tmp_path) as log, serving(image, tmp_path / "fifo") as server:
        assert_serves(image, b"A")
        log.close()
        stray(image, 2)
        assert_serves(image, b"B")
        assert_ends_in_order(server, image, b"B")


def test_a_full_disk_below_the_log_ends_nothing(image: Path) -> None:
    with serving(image, Path("/dev/full")) as server:
        stray(image, 2)
        assert_serves(image, b"A")
        assert_ends_in_order(server, image, b"A")


def test_a_log_that_nobody_reads_holds_up_nobody_and_says_later_what_is_missing(
    image: Path, tmp_path: Path
) -> None:
    with pipe(tmp_path, 8192) as log, serving(image, tmp_path / "fifo") as server:
        stray(image, 100)
        assert_serves(image, b"A")
        kept = log.read()
        stray(image)
        assert_ends_in_order(server, image, b"A")
        later = log.read().decode()
    said = re.search(r"nbdproxy: (\d+) lines were lost here", later)
    assert said is not None, later
    whole = kept.decode() + later
    assert whole.count("client broke the protocol") > 10
    assert whole.count("client broke the protocol") + int(said[1]) == 101


def test_a_flood_of_strays_does_not_fill_the_log() -> None:
    now = [0.0]
    complaints = Complaints(burst=3, clock=lambda: now[0])
    with capture_logs() as said:
        for _ in range(1000):
            complaints.warn("client broke the protocol", "junk", client="tcp")
        assert len(said) == 3
        now[0] = 1.5
        complaints.warn("client broke the protocol", "junk", client="tcp")
        complaints.warn("client broke the protocol", "junk", client="tcp")
    assert [line.get("unsaid") for line in said] == [None, None, None, 997]


def test_strays_are_said_two_hundred_times_and_then_counted(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    with serving(image, log) as server:
        began = time.monotonic()
        stray(image, 250)
        assert server.stop() == 0
        assert log.read_text().count("broke the protocol") < 202 + time.monotonic() - began


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_what_is_meant_for_people_never_goes_to_the_image(image: Path, closed: str) -> None:
    """A descriptor that is closed must not become the image's."""
    words = " ".join([*COMMAND, "serve", f"'{image}'", "--read-only", "--verbose"])
    command = f"{words} --run 'echo of the command; echo of the command >&2' {closed}"
    done = subprocess.run(["sh", "-c", command], timeout=DEADLINE_S, check=False)
    assert done.returncode == 0
    assert image.read_bytes() == b"-" * SIZE


@pytest.fixture
def run(image: Path) -> Path:
    command = "; ".join(["qemu-io -f raw -c 'write -P 65 0 512' $uri > /dev/null"] * 3)
    nbdproxy("serve", image, "--record", image.parent / "run", "--run", command)
    return image.parent / "run"


def told_nobody(*words: str | Path) -> tuple[int, str]:
    """Run a command whose reader has gone; return its exit code and what it says."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, *map(str, words)], stdout=writing, stderr=subprocess.PIPE,
                          timeout=DEADLINE_S, check=False)  # fmt: skip
    os.close(writing)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("words", [("log",), ("info", "--json")])
def test_a_reader_that_has_seen_enough_is_no_failure(run: Path, words: tuple[str, ...]) -> None:
    assert told_nobody(words[0], run, *words[1:]) == (0, "")


def test_a_verdict_is_the_same_when_its_reader_goes(run: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.write_text(f"{'0' * 64}  a\n")
    words = ("replay", run, "--files", files, "--root", "/")
    whole = nbdproxy(*words, code=None)
    assert whole.returncode in {1, 2}
    assert told_nobody(*words) == (whole.returncode, whole.stderr)


@pytest.mark.parametrize("words", [("log",), ("info",), ("info", "--json")])
def test_results_that_cannot_be_written_are_no_results(
    run: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    argv, said = [words[0], str(run), *words[1:]], tmp_path / "said"
    pid = shared().start(argv, Path("/dev/full"), said)
    deadline = time.monotonic() + DEADLINE_S
    while (ended := shared().ended(pid)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert ended == 2
    assert said.read_text() == (
        "nbdproxy: the result cannot be written to standard output: No space left on device; make "
        "room there, or send it elsewhere\n"
    )

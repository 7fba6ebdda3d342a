"""A log, or a reader of results, that fails: it ends no disk, and changes no exit code.

Not covered: a file on a network filesystem that hangs.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.serving import COMMAND, DEADLINE_S, nbdproxy, until

SIZE = 64 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


@contextmanager
def serving(image: Path, stderr: int | IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A server on `socket` beside the image, which records to `run` there."""
    folder = image.parent
    options = map(str, (image, "--socket", folder / "socket", "--record", folder / "run"))
    words = [*COMMAND, "serve", *options]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=stderr)  # fmt: skip
    with process:
        try:
            until(lambda: (folder / "socket").exists() or process.poll() is not None, "it listens")
            yield process
        finally:
            process.kill()


def stray(image: Path, count: int = 1) -> None:
    """Knock as a web browser would: each time is a line of the log."""
    for _ in range(count):
        with socket.socket(socket.AF_UNIX) as knock:
            knock.connect(str(image.parent / "socket"))
            knock.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(64))
            while knock.recv(4096):
                pass


def assert_serves(image: Path, letter: bytes) -> None:
    with NbdClient.at(image.parent / "socket") as client:
        client.write(0, letter * 512)
        client.flush()


def assert_ends_in_order(process: subprocess.Popen[bytes], image: Path, letter: bytes) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0
    assert image.read_bytes()[:512] == letter * 512
    assert "ended by SIGTERM" in nbdproxy("info", image.parent / "run").stdout


def test_a_reader_of_the_log_that_goes_ends_nothing(image: Path) -> None:
    reading, writing = os.pipe()
    with serving(image, writing) as process:
        os.close(writing)
        assert_serves(image, b"A")
        os.close(reading)
        stray(image, 2)
        assert_serves(image, b"B")
        assert_ends_in_order(process, image, b"B")


def test_a_full_disk_below_the_log_ends_nothing(image: Path) -> None:
    with Path("/dev/full").open("wb") as full, serving(image, full) as process:
        stray(image, 2)
        assert_serves(image, b"A")
        assert_ends_in_order(process, image, b"A")


def test_a_log_that_nobody_reads_holds_up_nobody_and_says_later_what_is_missing(
    image: Path,
) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 8192)
    with serving(image, writing) as process, os.fdopen(reading, "rb") as log:
        os.close(writing)
        os.set_blocking(reading, False)
        stray(image, 100)
        assert_serves(image, b"A")
        kept = log.read()
        stray(image)
        assert_ends_in_order(process, image, b"A")
        later = log.read().decode()
    said = re.search(r"nbdproxy: (\d+) lines were lost here", later)
    assert said is not None, later
    whole = kept.decode() + later
    assert whole.count("client broke the protocol") + int(said[1]) == 101


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
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


def piped(output: int | IO[bytes], *words: str | Path) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *words], stdout=output, stderr=subprocess.PIPE,
                          timeout=DEADLINE_S, check=False)  # fmt: skip
    return done.returncode, done.stderr.decode()


def nobody() -> int:
    """A pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("words", [("log",), ("log", "--json"), ("info",), ("info", "--json")])
def test_a_reader_that_has_seen_enough_is_no_failure(run: Path, words: tuple[str, ...]) -> None:
    gone = nobody()
    assert piped(gone, words[0], run, *words[1:]) == (0, "")
    os.close(gone)


def test_a_verdict_is_the_same_when_its_reader_goes(run: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.write_text(f"{'0' * 64}  a\n")
    words = ("replay", run, "--files", files, "--root", "/")
    whole = nbdproxy(*words, code=None)
    assert whole.returncode in {1, 2}
    gone = nobody()
    code, _ = piped(gone, *words)
    os.close(gone)
    assert code == whole.returncode


@pytest.mark.parametrize("words", [("log",), ("info",), ("info", "--json")])
def test_results_that_cannot_be_written_are_no_results(run: Path, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        code, said = piped(full, words[0], run, *words[1:])
    assert code == 2
    assert said == (
        "nbdproxy: the result cannot be written to standard output: No space left on device; make "
        "room there, or send it elsewhere\n"
    )

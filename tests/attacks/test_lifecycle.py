"""How a server ends: by SIGHUP as by SIGTERM, and with all that its command started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import processes_with
from tests.support.serving import COMMAND, DEADLINE_S, Server, nbdproxy, until

SIZE = 64 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


def test_a_closed_terminal_ends_in_order(image: Path, tmp_path: Path) -> None:
    options = ("--record", tmp_path / "run", "--policy", "drop-unflushed")
    with Server(image, *options) as server:
        client = server.client()
        client.write(0, b"A" * 512)
        client.flush()
        server.signal(signal.SIGHUP)
        assert server.wait() == 0
        client.drop()
    assert "ended by SIGHUP" in nbdproxy("info", tmp_path / "run").stdout
    assert image.read_bytes()[:512] == b"A" * 512


def test_who_ignores_sighup_goes_on(image: Path) -> None:
    with Server(image, command=("nohup", *COMMAND)) as server:
        server.signal(signal.SIGHUP)
        with server.client() as client:
            client.write(0, b"A" * 512)
        assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_is_that_of_all_that_a_command_started(
    image: Path, tmp_path: Path, number: signal.Signals
) -> None:
    mark = f"{tmp_path}/child"
    command = f"(sh -c 'touch {mark}; sleep 600; true'; true) & sh -c 'sleep 600; : {mark}'; true"
    words = [*COMMAND, "serve", str(image), "--run", command]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        until(Path(mark).exists, "the command runs")
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    assert not processes_with(mark)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_child_that_ignores_it_is_killed(image: Path, tmp_path: Path, signals: int) -> None:
    """After some seconds; at once, with a second signal."""
    mark = f"{tmp_path}/child"
    command = f"(trap '' TERM; touch {mark}; sleep 600; : {mark}) & wait"
    hasty = "import nbdproxy.server.service as s; s._GRACE_S = 0.5; from nbdproxy.cli.app import *"
    words = [COMMAND[0], "-c", f"{hasty}; main()", "serve", str(image), "--run", command]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        until(Path(mark).exists, "the command runs")
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)
    until(lambda: not processes_with(mark), "the child is gone", 2)


def test_a_command_that_clears_its_environment_ends_too(image: Path, tmp_path: Path) -> None:
    mark = f"{tmp_path}/command"
    command = f"exec env -i sh -c 'touch {mark}; exec sleep 600'"
    words = [*COMMAND, "serve", str(image), "--run", command]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        until(Path(mark).exists, "the command runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_what_is_not_of_the_command_is_left_alone(image: Path, tmp_path: Path) -> None:
    """Another part of the same pipeline, and a daemon, which has a session of its own."""
    with subprocess.Popen(["sleep", "600"]) as other:
        pid_file = tmp_path / "pid"
        daemon = f"setsid sh -c 'echo $$ > {pid_file}; exec sleep 600' &"
        command = f'{daemon} while ! [ -s {pid_file} ]; do :; done; kill "$PPID"; sleep 600'
        nbdproxy("serve", image, "--run", command, code=143)
        os.kill(int(pid_file.read_text()), signal.SIGKILL)  # it was there
        assert other.poll() is None
        other.kill()

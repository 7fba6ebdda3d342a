"""Whatever ends an exploration: no worker, no command and no file of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import processes_with
from tests.support.recorded_runs import Run, make
from tests.support.serving import until


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left(recorded: Run, tmp_path: Path, number: signal.Signals) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    began = tmp_path / "began"
    command = f"touch {began}; sleep 300 # $image"
    words = ["explore", str(recorded.run), "--check", command, "--workers", "2", "--states", "40"]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdproxy", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(began.exists, "a command runs")
    assert len(processes_with(str(scratch))) > 2
    process.send_signal(number)
    assert process.wait(30) == (-9 if number == signal.SIGKILL else 130)
    until(lambda: not processes_with(str(scratch)), "all processes are gone")
    if number != signal.SIGKILL:
        assert not list(scratch.rglob("*"))


@pytest.mark.parametrize("delay_s", [0.05, 0.2, 0.4])
def test_ctrl_c_while_the_workers_start_prints_no_traceback(
    recorded: Run, tmp_path: Path, delay_s: float
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["explore", str(recorded.run), "--check", "sleep 30 # $image", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdproxy", *words],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: len(processes_with(str(scratch))) > 2, "a worker starts")
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=30)
    assert "Traceback" not in said
    assert process.returncode == 130
    until(lambda: not processes_with(str(scratch)), "all processes are gone")


_INTERRUPTED = """
import os, runpy, signal, sys

class Interrupts:  # as a terminal does while a module is looked for
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
runpy.run_module("nbdproxy", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["nbdproxy.errors", "typer.models"])
def test_ctrl_c_while_the_command_is_imported_prints_no_traceback(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, "--help", module],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr

"""Whatever ends an exploration: no worker, no command and no file of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import processes_with
from tests.support.recorded_runs import Run, make
from tests.support.serving import until


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
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

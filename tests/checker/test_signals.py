"""Whatever ends a command that asks the kernel oracle: no guest and no file of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdproxy.lab.guest.build import build_lab
from tests.support.processes import processes_with
from tests.support.serving import tool, until

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_guest_is_left(tmp_path: Path, number: signal.Signals) -> None:
    """Struck while the guest boots."""
    build_lab()
    image, scratch = tmp_path / "image", tmp_path / "scratch"
    scratch.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    tool("mke2fs", "-q", "-F", "-t", "ext4", image)
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdproxy", "check", str(image), "--oracle", "kernel"],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(lambda: any(scratch.rglob("port")), "the guest is there")
    assert len(processes_with(str(scratch))) >= 2  # the command and its guest
    process.send_signal(number)
    process.wait(30)
    until(lambda: not processes_with(str(scratch)), "all processes are gone")
    if number != signal.SIGKILL:
        assert not list(scratch.iterdir())

"""Real filesystems for the oracles: made by mke2fs and debugfs, without root and without a kernel.

A missing tool fails the tests: an oracle that was not compared with anything proves nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from tests.support.systems import Part, disk

Run = Callable[..., str]
Make = Callable[..., Path]
Debugfs = Callable[[Path, Sequence[str]], str]


def _run(*command: str | Path, check: bool = True, stdin: str = "") -> str:
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    done = subprocess.run(
        command,
        input=stdin.encode("utf-8", "surrogateescape"),
        capture_output=True,
        timeout=60,
        env=environment,
        check=False,
    )
    output = (done.stdout + done.stderr).decode("utf-8", "surrogateescape")
    assert not check or done.returncode == 0, f"{command}: {output}"
    return output


@pytest.fixture
def run() -> Run:
    """Run a command to its end; its output."""
    return _run


@pytest.fixture
def make_image(tmp_path: Path) -> Make:
    """Make an ext filesystem from mke2fs options, filled from a folder."""

    def make(*options: str, folder: Path | None = None, size: str = "16M", name: str = "") -> Path:
        image = tmp_path / (name or f"image{len(list(tmp_path.iterdir()))}")
        source = ("-d", folder) if folder else ()
        _run("mke2fs", "-q", "-F", *options, *source, image, size)
        return image

    return make


@pytest.fixture
def debugfs() -> Debugfs:
    """Run debugfs commands on an image, which they may change."""

    def run_debugfs(image: Path, commands: Sequence[str]) -> str:
        return _run("debugfs", "-w", "-f", "/dev/stdin", image, stdin="\n".join(commands) + "\n")

    return run_debugfs


@pytest.fixture
def load() -> Callable[[Path], MemoryDisk]:
    """An image as a disk in memory."""

    def read(image: Path) -> MemoryDisk:
        return MemoryDisk(image.read_bytes())

    return read


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MemoryDisk]:
    """Make a disk of some partitions; what was made before is made from the same bytes."""
    known: dict[str, bytes] = {}

    def make(*parts: Part) -> MemoryDisk:
        key = repr(parts)
        if key not in known:
            known[key] = disk(tmp_path_factory.mktemp("disk"), *parts)
        return MemoryDisk(known[key])

    return make

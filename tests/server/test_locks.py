"""One program writes an image: QEMU's tools and nbdproxy keep each other out, both ways round.

QEMU's other programs are in tests/interop/test_locks.py. Not covered: two hosts.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.proxies import Proxy
from tests.support.serving import DEADLINE_S, nbdproxy, tool, until

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image."""
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


def qemu_io(image: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a command of qemu-io."""
    words = ["qemu-io", "-f", "raw", *options, "-c", command, str(image)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def held_by_qemu_io(image: Path, *options: str, image_format: str = "raw") -> Iterator[int]:
    """Have a qemu-io that has the image open; yields its process."""
    words = ["qemu-io", "-f", image_format, *options, str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            opened = Path(f"/proc/{process.pid}/fd")
            until(
                lambda: any(link.resolve() == image.resolve() for link in opened.iterdir()),
                "qemu-io has the image open",
            )
            process.stdin.write(b"read 0 512\n")  # behind its locks
            process.stdin.flush()
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()
            process.wait(DEADLINE_S)


def refused(*words: str | Path) -> str:
    """The one sentence with which a command refuses."""
    said = nbdproxy(*words, code=2).stderr
    assert said.count("\n") == 1, said
    return said


def test_qemu_cannot_write_what_is_being_served(image: Path, tmp_path: Path) -> None:
    """A reader of raw bytes does not mind writers, neither QEMU's own nor us."""
    with Proxy(tmp_path / "proxy", image):
        done = qemu_io(image, "write -P 65 0 512")
        assert done.returncode != 0
        assert "lock" in done.stderr
        assert qemu_io(image, "read -P 45 0 512", "-r").returncode == 0
    assert image.read_bytes() == b"-" * SIZE
    assert qemu_io(image, "write -P 65 0 512").returncode == 0


def test_qemu_cannot_read_the_tables_of_what_is_being_served(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    info = ["qemu-img", "info", str(image)]
    with Proxy(tmp_path / "proxy", image, "--format", "raw"):
        assert subprocess.run(info, capture_output=True, check=False).returncode != 0
        assert subprocess.run([*info, "-U"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("option", ["--read-only", "--overlay"])
def test_what_is_only_read_may_be_read_by_qemu(image: Path, tmp_path: Path, option: str) -> None:
    with Proxy(tmp_path / "proxy", image, option):
        assert qemu_io(image, "read 0 512", "-r").returncode == 0
        done = qemu_io(image, "write -P 65 0 512")
        assert done.returncode != 0
        assert "lock" in done.stderr
    assert image.read_bytes() == b"-" * SIZE


def test_what_qemu_writes_is_neither_served_nor_read(image: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.write_text("0" * 64 + "  /a\n")
    with held_by_qemu_io(image) as process:
        for words in (
            ("serve", image, "--run", "true"),
            ("serve", image, "--read-only", "--run", "true"),
            ("serve", image, "--overlay", "--run", "true"),
            ("check", image, "--files", files, "--no-fsck"),
            ("manifest", image),
        ):
            said = refused(*words)
            assert f"{image} is in use by another nbdproxy, or by QEMU or one of its tools" in said
            assert f"(qemu-io, process {process})" in said
            assert "end that one first, or use a copy" in said


def test_what_qemu_reads_may_be_read_and_not_written(tmp_path: Path) -> None:
    """A reader of a format with tables: they must not change under it."""
    image = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    with held_by_qemu_io(image, "-r", image_format="qcow2"):
        options = ("--format", "raw", "--read-only")
        with Proxy(tmp_path / "proxy", image, *options) as proxy, proxy.client() as client:
            assert client.read(0, 3) == b"QFI"
        said = refused("serve", image, "--format", "raw", "--run", "true")
        assert "has it open" in said


def test_an_audit_waits_for_nobody(image: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Proxy(tmp_path / "proxy", image, "--record", run) as proxy:
        with proxy.client() as client:
            client.write(0, b"A" * 512)
            client.flush()
        assert proxy.stop() == 0
    with held_by_qemu_io(image):
        assert "or by QEMU or one of its tools (qemu-io, " in refused("audit", run, image)
    assert nbdproxy("audit", run, image).returncode == 0


def test_two_of_us_and_the_first_is_named(image: Path, tmp_path: Path) -> None:
    with Proxy(tmp_path / "proxy", image) as proxy:
        said = refused("serve", image, "--run", "true")
        assert "is in use by another nbdproxy" in said
        assert f"process {proxy.pid})" in said

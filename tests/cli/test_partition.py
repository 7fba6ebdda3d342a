"""Disks with several filesystems: the one with the files is found, or has to be named."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.ext4 import BLOCK, FLUSHED, SIZE, UNFLUSHED, stages
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy, tool

MIB = 1 << 20
START = MIB
LAYOUT = f"label: dos\nstart={START // 512},size={SIZE // 512}\nstart={9 * MIB // 512},size=16384\n"


def disk(folder: Path, first: bytes, second: bytes) -> Path:
    """An image of two partitions."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(18 * MIB)
    subprocess.run(["/sbin/sfdisk", "-q", image], input=LAYOUT.encode(), check=True)
    with image.open("r+b") as file:
        for at, content in ((START, first), (9 * MIB, second)):
            file.seek(at)
            file.write(content)
    return image


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, Path]:
    """A filesystem without files, one with two, and the manifest of those, as the guest's."""
    folder = tmp_path_factory.mktemp("made")
    empty, _, full = stages(folder)
    listed = tool("sha256sum", folder / FLUSHED, folder / UNFLUSHED)
    manifest = folder / "manifest"
    manifest.write_text(listed.replace(str(folder), ""))
    return empty, full, manifest


def test_the_partition_with_the_files_is_found(
    made: tuple[bytes, bytes, Path], tmp_path: Path
) -> None:
    empty, full, manifest = made
    image = disk(tmp_path, empty, full)
    said = nbdproxy("check", image, "--files", manifest, code=0).stdout
    assert "  mounts   yes\n" in said
    assert "  files    2 whole\n" in said
    shown = nbdproxy("check", image, code=0).stdout.splitlines()
    assert shown[1:6:4] == ["  partition 1", "  partition 2"]
    assert shown.count("  fsck     clean") == 2
    assert "  fsck     clean\n" in nbdproxy("check", image, "--partition", "1", code=0).stdout
    assert "--partition" in nbdproxy("manifest", image, code=2).stderr
    assert f"/{FLUSHED}" in nbdproxy("manifest", image, "--partition", "2", code=0).stdout


def test_of_two_that_have_them_one_is_named(
    made: tuple[bytes, bytes, Path], tmp_path: Path
) -> None:
    _, full, manifest = made
    image, run = disk(tmp_path, full, full), tmp_path / "run"
    with ForkedServer(tmp_path, image, "--record", run) as server:
        client = server.client()
        client.write(17 * MIB, bytes(BLOCK))
        client.disc()
        server.signal(signal.SIGTERM)
        server.wait()
    for words in (
        ("check", image, "--files", manifest),
        ("replay", run, "--files", manifest),
        ("explain", run, f"/{FLUSHED}", "--files", manifest),
        ("explore", run, "--files", manifest, "--states", "2"),
    ):
        refused = nbdproxy(*words, code=2)
        assert "--partition" in refused.stdout + refused.stderr
        nbdproxy(*words, "--partition", "2", code=0)
    nbdproxy("explain", run, f"/{FLUSHED}", "--partition", "2", code=0)

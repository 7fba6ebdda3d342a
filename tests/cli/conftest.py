"""One recording of an ext4 for all commands: a file that was flushed and one that was not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ext4 import FLUSHED, UNFLUSHED, content, replay_stage, stages
from tests.support.serving import Server


@dataclass(frozen=True)
class Recorded:
    """A recording, the image it left, and a manifest of both files."""

    folder: Path
    run: Path
    image: Path
    manifest: Path


def record(folder: Path, *, flush_all: bool, kill: bool = False) -> Recorded:
    """Write FLUSHED, flush, write UNFLUSHED, and flush that too or not; then SIGTERM or SIGKILL."""
    image, run, manifest = folder / "image", folder / "run", folder / "files"
    images = stages(folder)
    image.write_bytes(images[0])
    with Server(image, "--record", run) as server:
        client = server.client()
        replay_stage(client, images[0], images[1])
        client.flush()
        replay_stage(client, images[1], images[2])
        if flush_all:
            client.flush()
        if kill:
            server.kill()
        else:
            assert server.stop() == 0
        client.drop()
    assert image.read_bytes() == images[2]
    lines = [f"{hashlib.sha256(content(n)).hexdigest()}  /{n}\n" for n in (FLUSHED, UNFLUSHED)]
    manifest.write_text("".join(lines))
    return Recorded(folder, run, image, manifest)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One file flushed, one not. Nobody may change it."""
    return record(tmp_path_factory.mktemp("recorded"), flush_all=False)


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One file flushed, one not, and the recorder killed. Nobody may change it."""
    return record(tmp_path_factory.mktemp("killed"), flush_all=False, kill=True)


@pytest.fixture(scope="session")
def all_flushed(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Both files flushed. Nobody may change it."""
    return record(tmp_path_factory.mktemp("flushed"), flush_all=True)

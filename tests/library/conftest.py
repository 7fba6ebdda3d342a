"""What the examples of the library find in their folder: a recording, its image and a manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

import nbdproxy
from tests.support.ext4 import FLUSHED, UNFLUSHED, content, replay_stage, stages
from tests.support.nbd_client import NbdClient


@dataclass(frozen=True)
class Prepared:
    """A folder with `run1`, `disk.img` as the recording left it, and `files.sha256`.

    `images` are the disk as it was: empty, with a file that is flushed, with one that is not.
    """

    folder: Path
    images: list[bytes]

    def write_files(self, uri: str) -> None:
        """Write both files to a disk that has neither, and flush between them."""
        client = NbdClient(uri)
        for number, (before, after) in enumerate(pairwise(self.images)):
            replay_stage(client, before, after)
            if not number:
                client.flush()
        client.disc()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The recording is made by the library itself. Nobody may change it."""
    folder = tmp_path_factory.mktemp("library")
    made = Prepared(folder, stages(folder))
    image = folder / "recorded.img"
    image.write_bytes(made.images[0])
    with nbdproxy.serve(image, record=folder / "run1") as served:
        made.write_files(served.uri)
    listed = [f"{hashlib.sha256(content(n)).hexdigest()}  /{n}\n" for n in (FLUSHED, UNFLUSHED)]
    (folder / "files.sha256").write_text("".join(listed))
    (folder / "tree").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "tree" / name).write_text(name)
    return made


@pytest.fixture
def here(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Run in a folder of its own with all of it, and a disk that has no files yet."""
    for one in prepared.folder.iterdir():
        (tmp_path / one.name).symlink_to(one)
    (tmp_path / "disk.img").write_bytes(prepared.images[0])
    monkeypatch.chdir(tmp_path)
    return prepared

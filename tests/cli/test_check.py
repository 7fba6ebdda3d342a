"""`nbdproxy check` as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Protocol

from nbdproxy.disks.file import FileDisk
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.manifest import dump
from tests.support.ext4 import FLUSHED, UNFLUSHED
from tests.support.serving import nbdproxy
from tests.support.systems import ROOT, Part, filesystem, manifest


class Made(Protocol):
    """A recording made by `tests/cli/conftest.py`."""

    run: Path
    image: Path
    manifest: Path


def test_a_good_state_and_one_that_lost_a_file(recorded: Made) -> None:
    words = ("check", recorded.run, "--files", recorded.manifest)
    said = nbdproxy(*words, "--at", "end", code=0).stdout
    assert "  mounts   yes\n" in said
    assert "  fsck     clean\n" in said
    assert "  files    2 whole\n" in said
    worst = ("--at", "end", "--mode", "none", "--failure", "host-power-loss")
    said = nbdproxy(*words, *worst, "--list", code=1).stdout
    assert f"missing        /{UNFLUSHED}\n" in said
    assert f"/{FLUSHED}" not in said
    found = json.loads(nbdproxy(*words, *worst, "--json", "--list", code=1).stdout)
    assert found["mounts"] is True
    assert found["files"]["conditions"] == {"whole": 1, "missing": 1}
    assert found["lost"] == {f"/{UNFLUSHED}": "missing"}
    assert found["fsck"]["run"] is True


def test_an_image_that_fsck_complains_of(recorded: Made, tmp_path: Path) -> None:
    image = Path(shutil.copy(recorded.image, tmp_path))
    disk = FileDisk(image, read_only=True)
    node = Filesystem(disk).lookup(f"/{FLUSHED}".encode())
    assert node is not None
    at = Filesystem(disk).inode_offset(node.number)
    disk.close()
    with image.open("r+b") as file:
        file.seek(at + 0x64)  # its generation, which its checksum covers
        file.write(b"\x5a")
    said = nbdproxy("check", image, code=1).stdout
    assert "  mounts   yes\n" in said
    assert f"Inode {node.number}" in said
    quiet = nbdproxy("check", image, "--no-fsck", code=0).stdout
    assert "not run: it was not asked for" in quiet


def test_what_cannot_be_told_and_what_is_wrong(recorded: Made, tmp_path: Path) -> None:
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(1 << 20))
    said = nbdproxy("check", blank, code=2).stdout
    assert "cannot be told: no filesystem found" in said
    blank.write_bytes(b"XFSB" + bytes((1 << 20) - 4))
    assert "--oracle kernel" in nbdproxy("check", blank, code=2).stdout
    assert "drop the options" in nbdproxy("check", blank, "--at", "end", code=2).stderr
    by_default, at_end = (nbdproxy("check", recorded.run, *at) for at in ((), ("--at", "end")))
    assert by_default.stdout == at_end.stdout
    assert "check the path" in nbdproxy("check", tmp_path / "nowhere", code=2).stderr


def test_errors_that_make_e2fsck_give_up_are_errors(recorded: Made, tmp_path: Path) -> None:
    image = Path(shutil.copy(recorded.image, tmp_path))
    # The root directory: exit code 12, 8 and 4.
    subprocess.run(["debugfs", "-w", "-R", "clri <2>", image], check=True, capture_output=True)
    said = nbdproxy("check", image, code=1).stdout
    assert "not a directory" in said or "still has errors" in said


def test_a_data_disk_is_checked_where_its_guest_mounts_it_and_a_copy_is_not(tmp_path: Path) -> None:
    files = {"/u/a": "a", "/u/b": "b"}
    listed, image = tmp_path / "files", tmp_path / "image"
    listed.write_text(dump(manifest({f"/home{path}": text for path, text in files.items()})))
    image.write_bytes(filesystem(tmp_path / "data", Part(files), 1))
    words = ("check", image, "--no-fsck", "--files", listed)
    assert "files    2 whole" in nbdproxy(*words, code=0).stdout
    image.write_bytes(filesystem(tmp_path / "root", Part({**ROOT, **files}), 1))
    said = nbdproxy(*words, code=2).stdout
    assert "2 cannot-be-told" in said and "may be a copy" in " ".join(said.split())
    assert "2 missing" in nbdproxy(*words, "--root", "/", code=1).stdout

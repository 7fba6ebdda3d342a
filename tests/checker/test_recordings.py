"""`--oracle kernel` and `both` on recordings of real guests."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab

FILES = 50
NBDPROXY = [sys.executable, "-m", "nbdproxy"]


def run(*words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*NBDPROXY, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def record(folder: Path, fs: str, words: str) -> tuple[Path, Path]:
    """Record a guest that writes files on a filesystem; return recording and manifest."""
    image, recording, qmp = folder / "disk.img", folder / "run", folder / "qmp"
    run("lab", "format", image, "--fs", fs, "--size", "320M")
    script = f"'for i in $(seq {FILES}); do echo $i > f$i; done'"
    guest = f'{" ".join(NBDPROXY)} lab run - "$uri" --script {script}'
    command = f"{guest} --fs {fs} --qmp {qmp} {words}"
    run("serve", image, "--record", recording, "--qmp", qmp, "--run", command)
    manifest = folder / "manifest"
    digests = (hashlib.sha256(f"{n}\n".encode()).hexdigest() for n in range(1, FILES + 1))
    manifest.write_text("".join(f"{one}  /f{n}\n" for n, one in enumerate(digests, start=1)))
    return recording, manifest


@pytest.mark.parametrize(("fs", "end"), [("xfs", "sync"), ("ntfs", "umount")])
def test_what_the_quick_oracle_does_not_read(tmp_path: Path, fs: str, end: str) -> None:
    """Under ntfs-3g `sync` sends what was written, and no flush; unmounting does."""
    recording, manifest = record(tmp_path, fs, f"--end {end}")
    words = ("replay", recording, "--files", manifest, "--failure", "host-power-loss", "--json")
    asked = (*words, "--mode", "none,unsafe", "--oracle", "kernel")
    none, unsafe = json.loads(run(*asked, status=1).stdout)["cells"]
    assert none["verdict"] == "pass"
    assert unsafe["worst"]["causes"] == {"flushed-then-lost": FILES}
    assert "--oracle kernel" in run(*words, status=2).stderr


def test_both_agree_on_every_file_of_every_state(tmp_path: Path) -> None:
    """With files that are whole, zeroed and missing."""
    mount = "--mount nodelalloc,data=writeback,commit=1 --end wait:3,sync"
    recording, manifest = record(tmp_path, "ext4", mount)
    words = ("replay", recording, "--files", manifest, "--root", "/", "--at", "riskiest")
    cells = ("--mode", "none,unsafe", "--failure", "host-power-loss")
    done = run(*words, *cells, "--oracle", "both", "--json", status=1)
    table = json.loads(done.stdout)
    assert table["differences"] == []
    assert table["compared"] > 2
    shown = {
        condition
        for cell in table["cells"]
        for end in ("worst", "best")
        for condition in cell[end]["conditions"]
    }
    assert {"whole", "zeroed", "missing"} <= shown
    assert "states: 0 differences" in done.stderr
    assert "both oracles judged 0" not in done.stderr
    explored = ("explore", recording, "--files", manifest, "--root", "/", "--at", "riskiest")
    more = run(*explored, "--oracle", "both", "--states", "2", "--workers", "1", "--json", status=1)
    assert json.loads(more.stdout)["verdicts"].get("unknown", 0) == 0

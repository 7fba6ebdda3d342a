"""The main job on the real thing: a guest on a disk served by nbdproxy, recorded, judged.

Each test boots a real guest. The files are those of an npm project, unpacked by tar: seconds
instead of minutes. Not covered: npm itself in the guest, which `scripts/demo` runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.lab.guest.build import build_lab

pytestmark = pytest.mark.lab

NBDPROXY = [sys.executable, "-m", "nbdproxy"]
Cells = dict[tuple[str, str], dict[str, Any]]


def run(*words: str | Path, status: int = 0) -> str:
    """Run nbdproxy and return its stdout."""
    command = [*NBDPROXY, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def record(folder: Path, guest: str, *, table: str | None = None) -> Path:
    """Record a guest that runs `nbdproxy lab run` with these words; return the recording."""
    image, recording, qmp = folder / "disk.img", folder / "run", folder / "qmp"
    run("lab", "format", image, *(["--table", table] if table else []))
    words = guest.replace("DISK", '"$uri"')
    command = f"{' '.join(NBDPROXY)} lab run {words} --qmp {qmp}"
    run("serve", image, "--record", recording, "--qmp", qmp, "--run", command)
    return recording


def judge(recording: Path, manifest: Path, *options: str, status: int = 1) -> Cells:
    """Replay a recording; return its cells by mode and failure."""
    where: tuple[str | Path, ...] = ("--files", manifest, "--root", "/", *options)
    table = json.loads(run("replay", recording, "--json", *where, status=status))
    return {(cell["mode"], cell["failure"]): cell for cell in table["cells"]}


def whole(cell: dict[str, Any], end: str = "worst") -> int:
    return int(cell[end]["conditions"].get("whole", 0))


@pytest.fixture(scope="module")
def npm_files() -> Path:
    """What a whole install of the small project leaves."""
    return build_lab().manifests["small"]


def test_a_sync_before_the_cut_keeps_every_file_but_under_unsafe(
    tmp_path: Path, npm_files: Path
) -> None:
    recording = record(tmp_path, "tar-small DISK --end sync --partition 1", table="gpt")
    cells = judge(recording, npm_files)
    files = whole(cells["none", "host-power-loss"])
    assert files > 600
    for mode in ("none", "writeback", "writethrough", "directsync"):
        for failure in ("guest-reset", "guest-poweroff", "qemu-kill", "host-power-loss"):
            assert cells[mode, failure]["verdict"] == "pass", (mode, failure)
    unsafe = cells["unsafe", "host-power-loss"]
    assert whole(unsafe) == 0
    assert unsafe["worst"]["causes"] == {"flushed-then-lost": files}
    assert whole(unsafe, "best") == files
    assert cells["none", "host-power-loss"]["cut"]["note"] == "QEMU's SHUTDOWN event"


def test_a_cut_at_once_is_the_guests_fault(tmp_path: Path, npm_files: Path) -> None:
    cells = judge(record(tmp_path, "tar-small DISK --end cut"), npm_files)
    lost = cells["writethrough", "host-power-loss"]["worst"]
    assert set(lost["causes"]) == {"never-sent"}
    assert lost["causes"]["never-sent"] > 600
    assert set(lost["conditions"]) <= {"whole", "missing", "empty"}


def test_full_length_zeroes_appear_and_writethrough_saves_what_writeback_loses(
    tmp_path: Path, npm_files: Path
) -> None:
    mount = "--mount nodelalloc,data=writeback,commit=1 --end wait:3,sync"
    recording = record(tmp_path, f"tar-small DISK {mount}")
    cells = judge(recording, npm_files, "--at", "riskiest", "--failure", "host-power-loss")
    by_mode = {mode: cell for (mode, _), cell in cells.items()}
    assert by_mode["writeback"]["worst"]["conditions"]["zeroed"] > 300
    assert set(by_mode["writeback"]["worst"]["causes"]) <= {
        "unflushed",
        "flush-in-flight",
        "never-sent",
    }
    assert whole(by_mode["none"]) == whole(by_mode["writeback"])
    assert whole(by_mode["writethrough"]) == whole(by_mode["directsync"])
    assert whole(by_mode["writethrough"]) > whole(by_mode["writeback"]) + 300
    assert whole(by_mode["unsafe"]) <= whole(by_mode["writeback"])


def test_a_file_that_was_fsynced_is_whole_under_every_mode_but_unsafe(tmp_path: Path) -> None:
    script = "echo kept | dd of=kept conv=fsync; echo lost > lost"
    recording = record(tmp_path, f"- DISK --script '{script}' --end cut")
    manifest = tmp_path / "files"
    manifest.write_text("".join(f"{_sha256(name)}  /{name}\n" for name in ("kept", "lost")))
    for (mode, failure), cell in judge(recording, manifest).items():
        expected = 0 if failure == "storage-loss" else 1
        if mode == "unsafe" and failure == "host-power-loss":
            expected = 0
        assert whole(cell) == expected, (mode, failure)


def _sha256(line: str) -> str:
    done = subprocess.run(
        ["sha256sum"], input=f"{line}\n", capture_output=True, text=True, check=True
    )
    return done.stdout.split()[0]

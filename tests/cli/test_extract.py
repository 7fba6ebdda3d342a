"""`nbdproxy extract` and what `--check` is given of a state, as users run them.

The examples of `explore --help` are run as they stand there, on a whole disk and on a partition.
"""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from nbdproxy.cli.explore import explore
from tests.cli.conftest import Recorded
from tests.support.ext4 import BLOCK, FLUSHED, SIZE, UNFLUSHED, content, replay_stage, stages
from tests.support.forked import ForkedServer
from tests.support.serving import COMMAND, nbdproxy

MIB = 1 << 20
LOSS = ("--at", "before-exit", "--mode", "none", "--failure", "host-power-loss")


def test_files_are_as_the_state_has_them(recorded: Recorded, tmp_path: Path) -> None:
    out, lost = tmp_path / "out", tmp_path / "lost"
    said = nbdproxy("extract", recorded.run, "-o", out).stdout
    assert "wrote 2 files" in said
    for name in (FLUSHED, UNFLUSHED):
        assert (out / name).read_bytes() == content(name)
    paths = (f"/{FLUSHED}", f"/{UNFLUSHED}")
    done = nbdproxy("extract", recorded.run, *LOSS, *paths, "-o", lost, code=1)
    assert f"lost     /{UNFLUSHED}: it is not there" in done.stdout
    assert [path.name for path in lost.iterdir()] == [FLUSHED]


def test_an_image_has_one_state_and_json_has_it_all(recorded: Recorded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = json.loads(nbdproxy("extract", recorded.image, "-o", out, "--json").stdout)
    [one] = [one for one in told["written"] if one["path"] == f"/{FLUSHED}"]
    assert (one["kind"], one["size"], one["mode"]) == ("file", 50_000, "0644")
    assert one["mtime"] == (out / FLUSHED).stat().st_mtime
    assert (told["lost"], told["unknown"], told["skipped"]) == ([], [], [])
    assert (
        "it has one state only"
        in nbdproxy(
            *("extract", recorded.image, "--at", "end", "-o", tmp_path / "two"), code=2
        ).stderr
    )


def test_what_cannot_be_done_is_said(recorded: Recorded, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    assert "-o DIR" in nbdproxy("extract", recorded.run, code=2).stderr
    assert "is not empty" in nbdproxy("extract", recorded.run, "-o", full, code=2).stderr
    assert [path.name for path in full.iterdir()] == ["mine"]
    nowhere = tmp_path / "no" / "folder"
    assert "cannot be written" in nbdproxy("extract", recorded.run, "-o", nowhere, code=2).stderr
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(MIB))
    said = nbdproxy("extract", blank, "-o", tmp_path / "out", code=2).stderr
    assert "no filesystem found" in said
    assert not (tmp_path / "out").exists()


def record(folder: Path, parts: int, *, spoilt: bool = False) -> Path:
    """Record writes to free blocks, and a mark; or what spoils the filesystem, last of all."""
    _, sound, other = stages(folder)
    image, run, control = folder / "image", folder / "run1", folder / "control"
    offsets = [MIB + number * SIZE for number in range(parts)] or [0]
    with image.open("wb") as file:
        file.truncate(offsets[-1] + SIZE)
        for offset in offsets:
            file.seek(offset)
            file.write(sound)
    if parts:
        lines = [f"start={at // 512},size={SIZE // 512}\n" for at in offsets]
        table = "label: dos\n" + "".join(lines)
        subprocess.run(["/sbin/sfdisk", "-q", image], input=table.encode(), check=True)
    with ForkedServer(folder, image, "--record", run, "--control", control) as server:
        client = server.client()
        free = offsets[0] + SIZE - BLOCK
        client.write(free, b"1" * BLOCK)
        client.flush()
        nbdproxy("ctl", control, "mark", "ready")
        client.write(free, b"2" * 1024)
        if spoilt:
            replay_stage(client, sound, other, offset=offsets[0])
        client.disc()
        server.signal(signal.SIGTERM)
        server.wait()
    return run


LAYOUTS = pytest.mark.parametrize("parts", [0, 1], ids=["whole disk", "partition"])


def examples() -> list[str]:
    """The commands in explore's help, each in one line."""
    text = (inspect.getdoc(explore) or "").partition("Examples:")[2].replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def explored(folder: Path, line: str, code: int) -> dict[str, int]:
    """Run an example in a folder; return the verdicts."""
    words = re.sub(r"^nbdproxy", " ".join(COMMAND), line)
    budget = "" if "--states" in line or "--exhaustive" in line else "--states 20"
    done = subprocess.run(
        ["sh", "-c", f"{words} {budget} --workers 1 --json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, (line, done.stdout, done.stderr)
    verdicts: dict[str, int] = json.loads(done.stdout)["verdicts"]
    return verdicts


@LAYOUTS
def test_the_examples_of_the_help_are_right(tmp_path: Path, parts: int) -> None:
    """As they stand, with a recording, a manifest and a check of the user's beside them."""
    run = record(tmp_path, parts)
    (tmp_path / "npm.sha256").write_text(nbdproxy("manifest", f"{run}@mark:ready").stdout)
    check = tmp_path / "my-check"
    check.write_text(f"""#!/bin/sh
case "$1" in
-) test "$(wc -c)" -ge {SIZE};;
*/app) test -f "${{1%/app}}/{FLUSHED}";;
*) test -n "$uri";;
esac
""")
    check.chmod(0o755)
    found = examples()
    assert len(found) == 5
    for line in found:
        verdicts = explored(tmp_path, line, 0)
        assert verdicts["pass"] > 0, line
        assert verdicts["fail"] == verdicts["unknown"] == 0, line


@LAYOUTS
def test_the_example_with_a_checker_finds_what_is_wrong(tmp_path: Path, parts: int) -> None:
    record(tmp_path, parts, spoilt=True)
    [line] = [line for line in examples() if "e2fsck" in line]
    assert explored(tmp_path, line.replace("--every write", "--at end"), 1)["fail"] > 1


def test_of_several_filesystems_one_is_named(tmp_path: Path) -> None:
    run = record(tmp_path, 2)
    where = f'test "$part" = 2 && test -f "$dir/{FLUSHED}" && e2fsck -fn "$fs"'
    words = ("explore", run, "--states", "2", "--workers", "1", "--check")
    for check in (where, 'test -e "$fs"', 'test -e "$dir"', 'test "$part"'):
        assert "--partition" in nbdproxy(*words, check, code=2).stderr
    nbdproxy(*words, 'test -e "$image"')
    nbdproxy(*words, where, "--partition", "2")
    refused = nbdproxy(*words, 'test -e "$image"', "--oracle", "kernel", code=2)
    assert "$dir" in refused.stderr


def test_a_check_of_files_is_shared_by_states_that_have_the_same_ones(tmp_path: Path) -> None:
    run, calls = record(tmp_path, 0), tmp_path / "calls"
    check = f'echo one >> {calls}; test -f "$dir/{FLUSHED}" && rm -rf "$dir"'
    words = ("explore", run, "--exhaustive", "--workers", "1", "--json", "--check", check)
    found = json.loads(nbdproxy(*words).stdout)
    assert (found["checked"], found["verdicts"]["pass"]) == (1, 4)
    assert len(calls.read_text().split()) == 1
    assert found["looked"]

"""Full disks of every kind that recordings lie on: nothing acknowledged is lost, and all is said.

They are real, in a guest (`filling` is what runs there): the recording's disk, also when its blocks
are shared with a copy, and when the server is killed that very moment; the image's; the log's; and
that of temporary files. Judged here, with what the guest left behind.

Simulated ones, with limits and injected errors, are in tests/server/test_full_disk.py,
tests/recording/test_full.py and test_stores.py. Not covered: quotas, and disks over a network.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from nbdproxy.recording.index import NEVER
from nbdproxy.recording.reader import Recording
from tests.attacks.filling import ATTACKS, CHUNK, IMAGE, MIB, SPARSE, Seen, chunk
from tests.support import nbd_client as nbd
from tests.support import uml
from tests.support.serving import nbdproxy, tool

DISKS = {
    "ext4": ("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}
SIZE = 320 * MIB
"""Bytes of a disk: XFS takes 300 MiB at least."""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a guest has filled its disks for."""
    folder = tmp_path_factory.mktemp("filled")
    disks = []
    for kind, words in DISKS.items():
        disk = folder / f"{kind}.disk"
        disk.touch()
        os.truncate(disk, SIZE)
        tool(*words, disk)
        disks.append(disk)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.attacks.filling",
        folder,
        *DISKS,
        "tmpfs",
    ]
    uml.run(folder, command, disks=disks)
    return folder


def seen(filled: Path, name: str) -> Seen:
    """What the guest saw."""
    found: Seen = json.loads((filled / "result.json").read_text())[name]
    return found


def said(filled: Path, name: str) -> str:
    """What the server said."""
    text = (filled / name / "err").read_text()
    assert "Traceback" not in text, text
    return text


def recorded(run: Path) -> list[int]:
    """The numbers of the writes that a recording says were done, checked byte by byte."""
    numbers, buffer = [], memoryview(bytearray(CHUNK))
    with Recording(run) as recording:
        recording.verify()
        table = recording.table
        done = (table.position >= 0) & (table.completed != NEVER) & (table.error == 0)
        for position in table.position[done].tolist():
            recording.read_payload(position, buffer)
            number = int.from_bytes(buffer[:8], "big")
            assert buffer == chunk(number)
            numbers.append(number)
    return numbers


def state(run: Path, size: int) -> bytes:
    """The disk at the recording's end, whose image was empty."""
    base, out = run.with_name("base"), run.with_name("state")
    with base.open("wb") as file:
        file.truncate(size)
    nbdproxy("open", run, "--at", "end", "--base", base, "-o", out)
    return out.read_bytes()


NOT_RECORDINGS = {"image", "log", "scratch"}
RECORDED = [
    f"{kind}-{name}"
    for kind, names in ATTACKS.items()
    for name in names
    if name not in NOT_RECORDINGS
]


@pytest.mark.parametrize("name", RECORDED)
def test_a_recording_whose_disk_is_full_has_all_that_was_acknowledged(
    filled: Path, name: str
) -> None:
    """The client gets ENOSPC, the server ends with a sentence, and no signal but ours."""
    found, told, run = seen(filled, name), said(filled, name), filled / name / "run"
    assert set(found["errors"]) == {nbd.ENOSPC}
    assert found["done"]
    if name.endswith("killed"):
        assert found["code"] == -9
    else:
        assert found["code"] == 2
        last = told.strip().splitlines()[-1]
        assert last.startswith("nbdproxy: the recording")
        assert last.endswith("No space left on device; make room and record again")
    numbers = recorded(run)
    assert set(found["done"]) <= set(numbers)
    assert not {*found["failed"]} & {*numbers}
    told = nbdproxy("info", run, "--verify").stdout
    assert "did not end in order" in told
    if not name.endswith("killed"):
        return
    content = {one * CHUNK % IMAGE: chunk(one) for one in sorted(numbers)}
    at_end = state(run, IMAGE)
    unknown = {one * CHUNK % IMAGE for one in found["failed"]}
    for at in content.keys() - unknown:
        assert at_end[at : at + CHUNK] == content[at]


@pytest.mark.parametrize("kind", DISKS)
def test_an_image_whose_disk_is_full_is_an_error_for_each_write(filled: Path, kind: str) -> None:
    """What was acknowledged is in the image and in the recording, which ends in order."""
    name = f"{kind}-image"
    found, told = seen(filled, name), said(filled, name)
    assert set(found["errors"]) <= {nbd.ENOSPC, nbd.EIO}
    assert nbd.ENOSPC in found["errors"]
    assert found["code"] in {0, 2}, told
    image, run = (filled / name / "image").read_bytes(), filled / name / "run"
    nbdproxy("info", run, "--verify")
    assert set(recorded(run)) == set(found["done"])
    at_end = state(run, SPARSE)
    for number in found["done"]:
        place = slice(number * CHUNK, (number + 1) * CHUNK)
        assert image[place] == at_end[place] == chunk(number)


def test_a_log_whose_disk_is_full_ends_nothing(filled: Path) -> None:
    found = seen(filled, "ext4-log")
    assert found["code"] == 0
    assert found["done"] and not found["errors"]
    run = filled / "ext4-log" / "run"
    assert "ended by SIGTERM" in nbdproxy("info", run, "--verify").stdout
    assert recorded(run) == found["done"]
    assert (filled / "ext4-log" / "log").read_text().count("\n") < 100  # not all were written


def test_temporary_files_whose_disk_is_full_are_an_error_for_each_write(filled: Path) -> None:
    found = seen(filled, "tmpfs-scratch")
    assert set(found["errors"]) == {nbd.ENOSPC}
    assert found["code"] == 0, said(filled, "tmpfs-scratch")
    run = filled / "tmpfs-scratch" / "run"
    nbdproxy("info", run, "--verify")
    assert set(recorded(run)) == set(found["done"])


def test_where_user_mode_linux_cannot_run_it_is_an_error_that_says_why(tmp_path: Path) -> None:
    refused = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=ptrace:error=EPERM")
    with pytest.raises(uml.UmlError, match=r"ended with status .*; it needs ptrace\(2\)"):
        uml.run(tmp_path, ["true"], under=refused)


def test_a_command_that_fails_in_the_guest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(uml.UmlError, match=r"ended with 3; it said:\nhello"):
        uml.run(tmp_path, ["sh", "-c", "echo hello; exit 3"])

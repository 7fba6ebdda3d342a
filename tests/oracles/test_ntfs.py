"""NTFS as mkntfs and ntfscp write it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.check import Verdict, check, scan
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.incremental import IncrementalCheck
from nbdproxy.oracles.manifest import Entry, Manifest, digest
from nbdproxy.oracles.partitions import slices
from nbdproxy.oracles.quick import QUICK

Run = Callable[..., str]
SIZE = 16 << 20
SMALL, LARGE = b"hello\n", os.urandom(100_000)


@pytest.fixture
def disk(run: Run, tmp_path: Path) -> MemoryDisk:
    """A file within its entry of the table, and one with clusters."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    run("mkntfs", "-q", "-F", image)
    for name, content in (("small", SMALL), ("lärge", LARGE)):
        (tmp_path / name).write_bytes(content)
        run("ntfscp", "-q", image, tmp_path / name, name)
    return MemoryDisk(image.read_bytes())


def wanted() -> Manifest:
    return Manifest(
        tuple(
            Entry(path, digest([content]), len(content))
            for path, content in (("/lärge", LARGE), ("/SMALL", SMALL), ("/none", b"x"))
        )
    )


EXPECTED = {"/lärge": Condition.WHOLE, "/SMALL": Condition.WHOLE, "/none": Condition.MISSING}


def test_files_are_read(disk: MemoryDisk) -> None:
    assert check(disk, wanted()).conditions == EXPECTED
    assert {(e.path, e.sha256) for e in scan(disk).entries} == {
        ("/lärge", digest([LARGE])),
        ("/small", digest([SMALL])),
    }
    examined = QUICK.examine(disk, partition=None)
    assert (examined.mounts, examined.replayed) == (True, ())
    assert isinstance(examined.fsck, str)


def test_what_changed_is_seen_from_state_to_state(disk: MemoryDisk) -> None:
    follower = IncrementalCheck(wanted())
    assert follower.check(disk, None).conditions == EXPECTED
    [part] = slices(disk)
    at = part.device.pread(0, SIZE).index(LARGE[:512])
    assert follower.reads.meets(at, at + 1)
    disk.pwrite(at, bytes([LARGE[0] ^ 1]))
    assert follower.check(disk, None).conditions["/lärge"] is Condition.DAMAGED


def test_one_that_was_not_closed_is_unknown(disk: MemoryDisk) -> None:
    """The flag that Windows sets as long as a volume is in use, in both copies of the entry."""
    content = disk.pread(0, SIZE)
    information = bytes.fromhex("0301") + b"\0\0"  # NTFS 3.1, no flags
    at = content.index(b"FILE", content.index(b"$\0V\0o\0l\0u\0m\0e\0") - 1024)
    where = content.index(information, at, at + 1024)
    disk.pwrite(where + 2, b"\1")
    found = check(disk, wanted())
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert found.reason is not None and "not closed in order" in found.reason


def test_without_the_library_it_is_unknown(
    disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytsk3", None)
    found = check(disk, wanted())
    assert found.verdict is Verdict.UNKNOWN
    assert found.reason is not None and "pip install 'nbdproxy[ntfs]'" in found.reason

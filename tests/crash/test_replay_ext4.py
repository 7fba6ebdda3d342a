"""The table on a real ext4, read by the real oracle: formatted, filled and half flushed."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.places import place
from nbdproxy.crash.blame.replay import Cell, JudgedFiles, Replay, ReplayOptions
from nbdproxy.crash.blame.replay import replay as judge
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import ANYWHERE, Where
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received, table_of

BLOCK = 4096
SECTORS = BLOCK // 512
OLD, NEW, LATE = b"old\n" * 3000, b"new\n" * 3000, b"late\n" * 3000
Log = list[Received | Completed]
FLUSH = Received(Command.FLUSH)


def changes(before: bytes, after: bytes) -> Iterator[int]:
    """The blocks in which two images differ."""
    for at in range(0, len(after), BLOCK):
        if before[at : at + BLOCK] != after[at : at + BLOCK]:
            yield at


def put(image: Path, name: str, content: bytes) -> bytes:
    """Put a file into an image with debugfs, and return the image's new content."""
    (image.parent / "content").write_bytes(content)
    script = f"rm /{name}\nwrite {image.parent / 'content'} {name}\n"
    subprocess.run(
        ["debugfs", "-w", "-f", "-", str(image)],
        input=script.encode(),
        check=True,
        capture_output=True,
    )
    return image.read_bytes()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A disk: blank, formatted with /f old, /f new, with /late as well."""
    image = tmp_path_factory.mktemp("ext4") / "image"
    blank = bytes(4 << 20)
    image.write_bytes(blank)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", str(image)], check=True)
    return [blank, put(image, "f", OLD), put(image, "f", NEW), put(image, "late", LATE)]


def recorded(images: list[bytes], log_of: Callable[[list[list[Received]]], Log]) -> MemorySource:
    """A recording that leads from image to image; `log_of` gets the writes of each step."""
    payloads, steps = [], []
    for before, after in pairwise(images):
        touched = list(changes(before, after))
        payloads += [after[at : at + BLOCK] for at in touched]
        steps.append([Received(Command.WRITE, at // 512, SECTORS) for at in touched])
    log = log_of(steps)
    base = images[0]
    return MemorySource(
        table_of(log), len(base), len(log), lambda: MemoryDisk(base), b"".join(payloads)
    )


def entry(path: str, content: bytes) -> Entry:
    return Entry(path, hashlib.sha256(content).hexdigest(), len(content))


MANIFEST = Manifest((entry("f", NEW), entry("late", LATE)))


def answered(log: Log, *requests: Received) -> None:
    for request in requests:
        log += [request, Completed(len(log))]


def replay(
    source: MemorySource, manifest: Manifest, *, where: Where = ANYWHERE, **options: Any
) -> Replay:
    """The table of a recording whose files are looked for."""
    timeline, asked = Timeline(source), ReplayOptions(**options)
    (tree,), found = place([timeline], manifest, [asked.cut(source)], where)
    return judge(JudgedFiles(timeline, found, tree), asked)


def cells(source: MemorySource) -> dict[tuple[str, str], Cell]:
    result = replay(source, MANIFEST)
    return {(found.mode.value, found.failure.value): found for found in result.cells}


def test_what_was_never_flushed_is_not_there_after_a_power_loss(images: list[bytes]) -> None:
    def log_of(steps: list[list[Received]]) -> Log:
        log: Log = []
        answered(log, *steps[0], FLUSH, *steps[1], FLUSH, *steps[2])
        return log

    found = cells(recorded(images, log_of))
    assert len(found) == len(CacheMode) * len(Failure)
    lost = found["none", "host-power-loss"]
    assert lost.verdict is Verdict.FAIL
    assert lost.worst.conditions == {Condition.WHOLE: 1, Condition.MISSING: 1}
    assert lost.worst.causes == {Cause.UNFLUSHED: 1}
    assert lost.best.verdict is Verdict.PASS
    assert found["directsync", "host-power-loss"].verdict is Verdict.PASS
    assert found["unsafe", "qemu-kill"].verdict is Verdict.PASS
    unsafe = found["unsafe", "host-power-loss"].worst
    assert unsafe.conditions == {Condition.MISSING: 2}
    assert unsafe.causes == {Cause.FLUSHED_THEN_LOST: 1, Cause.UNFLUSHED: 1}


def test_an_older_version_on_the_base_is_stale(images: list[bytes]) -> None:
    def log_of(steps: list[list[Received]]) -> Log:
        log: Log = []
        answered(log, *steps[0])
        return [*log, FLUSH, *steps[1]]

    found = cells(recorded(images[1:], log_of))["writeback", "host-power-loss"]
    assert found.worst.files["/f"].condition is Condition.STALE
    assert found.worst.files["/f"].cause is Cause.FLUSH_IN_FLIGHT
    assert found.worst.files["/late"].cause is Cause.SENT_UNANSWERED


def test_a_manifest_that_matches_only_at_the_cut_is_found_there(images: list[bytes]) -> None:
    """The disk is wiped in the end: nothing of the manifest is left there."""
    source = recorded([images[2], images[0]], lambda steps: [FLUSH, *steps[0]])
    wanted = Manifest((entry("f", NEW),))
    found = replay(source, wanted, at="seq:0", failures=[Failure.QEMU_KILL])
    assert found.manifest == Manifest((entry("/f", NEW),))
    with pytest.raises(FilesystemError):
        replay(source, wanted, at="end")


def test_a_manifest_of_other_files_is_refused(images: list[bytes]) -> None:
    source = recorded(images[2:], lambda steps: [*steps[0]])
    with pytest.raises(ManifestError):
        replay(source, Manifest((entry("x", OLD),)))


def test_a_root_that_the_guest_removed_was_there(images: list[bytes], tmp_path: Path) -> None:
    """Its files were changed by the guest, and one that never was is lost in it."""
    image = tmp_path / "image"
    image.write_bytes(images[1])
    subprocess.run(["debugfs", "-w", "-R", "mkdir d", image], check=True, capture_output=True)
    full = put(image, "d/f", NEW)

    def log_of(steps: list[list[Received]]) -> Log:
        log: Log = []
        answered(log, *steps[0], FLUSH, *steps[1], FLUSH)
        return log

    source = recorded([images[1], full, images[1]], log_of)
    wanted = Manifest((entry("f", NEW), entry("g", NEW)))
    for root, expected in (
        ("/d", [Cause.CHANGED_BY_GUEST, Cause.NEVER_SENT]),
        ("/e", [None, None]),
    ):
        found = replay(
            source,
            wanted,
            modes=[CacheMode.NONE],
            failures=[Failure.HOST_POWER_LOSS],
            where=Where(root=root),
        )
        assert [one.cause for one in found.cells[0].worst.files.values()] == expected

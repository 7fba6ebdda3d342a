"""Whole guests, as installers lay them out: no file is called lost, and one that is lost is found.

Each disk is written as a whole, and flushed; but of each filesystem one file's content was never
sent, and one's was sent last and never flushed.
"""

from __future__ import annotations

import mmap
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.places import place
from nbdproxy.crash.blame.replay import JudgedFiles, ReplayOptions, replay
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.oracles.condition import Condition
from nbdproxy.persistence.modes import CacheMode, Failure
from tests.support import layouts
from tests.support.forked import ForkedServer
from tests.support.layouts import LOST, Layout
from tests.support.nbd_client import WRITE, Op

pytestmark = pytest.mark.lab

NAMED = {layout.name: layout for layout in layouts.LAYOUTS}
UNFLUSHED, UNSENT = LOST


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return layouts.make(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelOracle]:
    with closing(KernelOracle()) as oracle:
        yield oracle


def record(layout: Layout, disk: Path, folder: Path) -> Path:
    """Record how a disk is written, but for what is lost."""
    late = {}
    with disk.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for path, wanted in layout.files().items():
            name = path.rpartition("/")[2]
            if name in LOST and layout.kind_of(path) != "luks":
                at = content.find(wanted)
                assert at >= 0
                content[at : at + len(wanted)] = bytes(len(wanted))
                if name == UNFLUSHED:
                    late[at] = wanted
    image, run = folder / "image", folder / "run"
    layouts.blank(image, disk.stat().st_size >> 20)
    with ForkedServer(folder, image, "--record", run) as server:
        uri = f"nbd+unix:///?socket={server.socket}"
        subprocess.run(["nbdcopy", "--flush", disk, uri], check=True, timeout=60)
        client = server.client()
        for at, wanted in late.items():
            whole = wanted + bytes(-len(wanted) % 512)
            assert not any(reply.error for reply in client.do(Op(WRITE, at, data=whole)))
        client.disc()
        server.signal(signal.SIGTERM)
        server.wait()
    return run


@pytest.mark.parametrize("name", NAMED)
def test_only_what_is_lost_is_called_lost_and_its_cause_is_right(
    name: str, disks: dict[str, Path], kernel: KernelOracle, tmp_path: Path
) -> None:
    layout = NAMED[name]
    with RecordedSource(record(layout, disks[name], tmp_path)) as source:
        timeline, cut = Timeline(source), resolve(source, "end")
        (tree,), wanted = place([timeline], layout.manifest(), [cut], oracle=kernel)
        asked = ReplayOptions([CacheMode.NONE], [Failure.HOST_POWER_LOSS], at="end")
        result = replay(JudgedFiles(timeline, wanted, tree, kernel), asked)
        timeline.close()
    (cell,) = result.cells
    expected = {path: expectation(layout, path) for path in cell.worst.files}
    assert {path: (one.condition, one.cause) for path, one in cell.worst.files.items()} == expected
    assert sum(cause is not None for _, cause in expected.values()) == 2 * READABLE[name]
    if name == "debian":
        assert "partition 3 is LUKS2" in (cell.worst.reason or "")


READABLE = {"debian": 2, "ubuntu": 2, "ubuntu-btrfs": 2, "fedora": 3, "opensuse": 2}
"""How many filesystems of each have files that were lost."""
CAUSES = {UNFLUSHED: Cause.UNFLUSHED, UNSENT: Cause.NEVER_SENT}


def expectation(layout: Layout, path: str) -> tuple[Condition, Cause | None]:
    """What became of a file, and who lost it; Btrfs has a checksum of what is not there."""
    kind = layout.kind_of(path)
    if kind == "luks":
        return Condition.CANNOT_BE_TOLD, None
    cause = CAUSES.get(path.rpartition("/")[2])
    if cause is None:
        return Condition.WHOLE, None
    return (Condition.UNREADABLE if kind == "btrfs" else Condition.ZEROED), cause

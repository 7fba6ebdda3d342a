"""Replace-by-rename without fsync, in real guests: empty files, unless ext4 is told to help.

Each test boots a guest on a disk that is served and recorded by nbdproxy, and judges the recording.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nbdproxy.case.case import Case
from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.replay import Cell
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.lab.guest import disk
from nbdproxy.lab.workloads import renames
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where
from nbdproxy.oracles.manifest import Manifest, dump, parse
from nbdproxy.persistence.modes import CacheMode, Failure
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy

MIB = 1 << 20
GUEST = pytest.mark.lab


def record(folder: Path, workload: str) -> RecordedSource:
    """Run a workload on a recorded disk, with marks for what it prints."""
    image, control = folder / "disk.img", folder / "ctl"
    disk.format_disk(image, 64 * MIB)
    with ForkedServer(folder, image, "--record", folder / "run", "--control", control) as server:
        uri = f"nbd+unix:///?socket={server.socket}"
        done = nbdproxy("lab", "run", workload, uri, "--control", control, timeout_s=200)
        assert "2 marks are in the recording" in done.stderr
        server.signal(15)
        assert server.wait() == 0, server.log
    return RecordedSource(folder / "run")


def judged(source: RecordedSource, manifest: Manifest, at: str | None = None) -> Cell:
    """Return the cell of cache=none and a host's power loss."""
    with Case([source], files=manifest, at=at, where=Where(root="/")) as case:
        return case.replay([CacheMode.NONE], [Failure.HOST_POWER_LOSS]).table.cells[0]


def old_before_the_renames(source: RecordedSource) -> None:
    """At the first mark all old versions are durable, and no new one was thought of."""
    assert (
        resolve(source, "mark:old-synced").position < resolve(source, "mark:new-renamed").position
    )
    old = judged(source, renames.old_manifest(), "mark:old-synced").worst
    assert old.conditions == {Condition.WHOLE: renames.FILES}


@GUEST
def test_files_are_empty_and_their_data_was_never_sent(tmp_path: Path) -> None:
    source = record(tmp_path, "rename")
    old_before_the_renames(source)
    cell = judged(source, renames.new_manifest())
    for outcome in (cell.worst, cell.best):
        assert outcome.conditions == {Condition.EMPTY: renames.FILES}
        assert outcome.causes == {Cause.NEVER_SENT: renames.FILES}
    source.close()


@GUEST
def test_no_file_is_empty_where_ext4_sends_the_data_with_the_rename(tmp_path: Path) -> None:
    source = record(tmp_path, "rename-auto-da-alloc")
    old_before_the_renames(source)
    for at in ("mark:new-renamed", None):
        cells = [judged(source, m, at) for m in (renames.new_manifest(), renames.old_manifest())]
        for outcomes in zip(*([cell.worst, cell.best] for cell in cells), strict=True):
            whole: Counter[str] = Counter()
            for outcome in outcomes:
                for path, file in outcome.files.items():
                    assert file.condition is not Condition.EMPTY, path
                    whole[path] += file.condition is Condition.WHOLE
            assert set(whole.values()) == {1}, "each is whole, old or new"
    new = judged(source, renames.new_manifest()).worst
    assert new.conditions == {Condition.WHOLE: renames.FILES}
    source.close()


def test_the_manifests_are_of_the_same_files_and_can_be_printed() -> None:
    new, old = renames.new_manifest(), renames.old_manifest()
    assert len(new.entries) == renames.FILES
    for one, other in zip(new.entries, old.entries, strict=True):
        assert (one.path, one.size) == (other.path, other.size)
        assert one.digest != other.digest
    for name, manifest in (("rename-new", new), ("rename-old", old)):
        assert parse(nbdproxy("lab", "manifest", name).stdout, name) == manifest
        assert dump(manifest) == nbdproxy("lab", "manifest", name).stdout

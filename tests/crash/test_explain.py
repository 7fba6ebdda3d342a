"""Files that are explained together: one look at a state for all, and the same is said of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nbdproxy.crash.blame import replay as module
from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.explain import FileExplanation, explain
from nbdproxy.crash.blame.file_history import histories
from nbdproxy.crash.blame.replay import JudgedFiles, ReplayOptions, replay
from nbdproxy.crash.blame.unmapped import Unmapped
from nbdproxy.crash.explore.judging import ManifestPlan
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.report.histories import to_json
from nbdproxy.requests import Command
from tests.crash.test_unmapped import CLUSTER, FILE, Stored, differing
from tests.support import ext4
from tests.support.exploring import ext4_case
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received, table_of

OPTIONS = ReplayOptions(failures=(Failure.HOST_POWER_LOSS, Failure.STORAGE_LOSS))
NEVER = Entry("/never", "0" * 64, 7)
AWAY = Entry("/away/file", "0" * 64, 7)
TREE = Tree((Mount(),), unreadable={"/away": "it is on another disk"})


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Timeline, Manifest]]:
    """A recording of two files, one flushed; one that was never sent, and one on no disk."""
    case = ext4_case(tmp_path_factory.mktemp("ext4"))
    assert isinstance(case.judge, ManifestPlan)
    with RecordedSource(case.run) as source, closing(Timeline(source)) as timeline:
        yield timeline, Manifest((*case.judge.manifest.entries, NEVER, AWAY))


def led_to(after: bytes, before: bytes) -> MemorySource:
    """A recording that led from one content to another, a request a cluster, without a flush."""
    log: list[Received | Completed] = []
    payload = bytearray()
    for number in differing(before, after):
        log += [Received(Command.WRITE, number * 8, 8), Completed(len(log))]
        payload += after[number * CLUSTER :][:CLUSTER]
    return MemorySource(
        table_of(log), len(after), len(log), lambda: MemoryDisk(before), bytes(payload)
    )


def explained(files: JudgedFiles) -> list[FileExplanation]:
    return explain(files, histories(files), OPTIONS)


def test_of_each_file_the_same_is_said_as_if_it_were_alone(
    opened: tuple[Timeline, Manifest],
) -> None:
    timeline, manifest = opened
    together = explained(JudgedFiles(timeline, manifest, TREE))
    assert [one.history.entry for one in together] == list(manifest.entries)
    fates = set()
    for entry, one in zip(manifest.entries, together, strict=True):
        (alone,) = explained(JudgedFiles(timeline, Manifest((entry,)), TREE))
        assert to_json(one, timeline.source) == to_json(alone, timeline.source)
        fates |= {cell.worst.condition_of(entry.path) for cell in one.replay.cells}
    assert len(fates) > 2


def test_of_a_state_that_cannot_be_judged_the_reason_is_said(tmp_path: Path) -> None:
    """Also beside a file that is elsewhere, of which it is known that it cannot be told."""
    after = ext4.stages(tmp_path)[1]
    source = led_to(after, b"garbage!" * (len(after) // 8))
    with closing(Timeline(source)) as timeline:
        together = explained(JudgedFiles(timeline, Manifest((FILE, AWAY)), TREE))
        for entry, one in zip((FILE, AWAY), together, strict=True):
            (alone,) = explained(JudgedFiles(timeline, Manifest((entry,)), TREE))
            assert to_json(one, source) == to_json(alone, source)
        cells = to_json(together[0], source)["cells"]
        assert "unknown (no filesystem found" in str(cells)


def test_a_state_is_judged_once_for_all_files_of_a_mount(
    opened: tuple[Timeline, Manifest],
) -> None:
    timeline, manifest = opened
    heard: list[str] = []
    wanted = Manifest(tuple(entry for entry in manifest.entries if entry is not AWAY))
    files = JudgedFiles(timeline, wanted, TREE, progress=lambda state: heard.append(str(state)))
    explain(files, histories(files), OPTIONS)
    assert len(heard) == len(set(heard)) > 2


def test_below_qcow2_what_is_known_of_one_file_says_nothing_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks for a file's clusters remembers what others had, and holes in their way."""
    stored = Stored(tmp_path)
    after = stored.without(stored.data)
    source = led_to(after, stored.before.ljust(len(after), b"\0"))
    options = ReplayOptions([CacheMode.NONE], [Failure.QEMU_KILL])
    asked: list[list[str]] = []

    class Noted(Unmapped):
        """Notes which files it is asked about."""

        def __init__(self, timeline: Timeline, position: int, mount: Mount) -> None:
            super().__init__(timeline, position, mount)
            self.asked: list[str] = []
            asked.append(self.asked)

        def cause(self, entry: Entry) -> Cause:
            """Return the cause for a file."""
            self.asked.append(entry.path)
            return super().cause(entry)

    monkeypatch.setattr(module, "Unmapped", Noted)
    for apart, expected in (
        (True, [[FILE.path], [NEVER.path]]),
        (False, [[FILE.path, NEVER.path]]),
    ):
        asked.clear()
        with closing(Timeline(source)) as timeline:
            files = JudgedFiles(timeline, Manifest((FILE, NEVER)), Tree(), apart=apart)
            (cell,) = replay(files, options).cells
        assert [list(dict.fromkeys(one)) for one in asked] == expected
        assert cell.worst.files[FILE.path].cause is Cause.MAPPING_NEVER_SENT
        assert cell.worst.files[NEVER.path].cause is Cause.NEVER_SENT

"""Whoever can exchange a recording's files while it is made gets no file of ours overwritten."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from nbdproxy.errors import UnsafeFolderError
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from tests.recording.example import ENDING, META, write
from tests.support.strangers import lay_open


def test_nothing_is_recorded_to_a_folder_of_somebody_else(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    lay_open(theirs)
    for path in (theirs, theirs / "new"):
        with pytest.raises(UnsafeFolderError, match="is not safe"):
            RecordingWriter(path, META)
    assert not list(theirs.iterdir())


def test_nothing_is_recorded_to_a_folder_that_others_can_add_files_to(tmp_path: Path) -> None:
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    with pytest.raises(UnsafeFolderError, match="can write"):
        RecordingWriter(sticky, META)
    RecordingWriter(sticky / "mine", META).close(ENDING)


@pytest.mark.parametrize("name", ["data", "events", "data.tail", "events.tail"])
def test_a_file_that_becomes_a_link_leads_nowhere(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious" * 10000)
    run = tmp_path / "run"
    writer = RecordingWriter(run, META)
    writer.completed(1, writer.received(1, [write(0, b"mine" * 1000)]), 1, 0)
    (run / name).unlink()
    (run / name).symlink_to(victim)
    writer.close(ENDING)
    assert victim.read_bytes() == b"precious" * 10000


def test_a_folder_that_is_moved_meanwhile_is_recorded_to_all_the_same(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "run", META)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    writer.completed(1, writer.received(1, [write(0, b"mine" * 1000)]), 1, 0)
    writer.close(ENDING)
    assert not list((tmp_path / "run").iterdir())
    with Recording(tmp_path / "moved") as found:
        assert found.ending == ENDING
        assert len(found.table) == 1
    assert sorted(one.name for one in (tmp_path / "moved").iterdir()) == ["data", "events"]


def test_what_is_recorded_is_its_owners_alone(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    RecordingWriter(run, META).close(ENDING)
    assert {stat.S_IMODE(one.stat().st_mode) for one in run.iterdir()} == {0o600}
    assert stat.S_IMODE(run.stat().st_mode) == 0o700

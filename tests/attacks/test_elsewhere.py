"""A recording from elsewhere reads nothing outside its folder, unless the user names it."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.cli.pack import pack, unpack
from nbdproxy.crash.explore.verdicts import Verdicts
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import NbdproxyError
from nbdproxy.recording import format as layout
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.pack import pack as pack_as_it_is
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from tests.support.strangers import NOBODY

SECRET = b"secret" * 1024


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the victim's that a recording names as its image."""
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


def recorded(folder: Path, image: Path, *, end: bool = True) -> Path:
    """A recording of nothing, on top of an image that is all data; perhaps of a killed recorder."""
    facts = Fingerprint.of(image)
    meta = Meta(facts.size, str(image), False, ((0, facts.size),), facts, (), "now", "test")
    writer = RecordingWriter(folder / "run", meta)
    if end:
        writer.close(Ending("done", facts))
        return folder / "run"
    killed = folder / "killed"
    shutil.copytree(folder / "run", killed)
    writer.close(Ending("done", facts))
    for file in killed.iterdir():  # into the same files
        shutil.copyfile(file, folder / "run" / file.name)
    return folder / "run"


def shown(run: Path, base: Path | None = None) -> bytes:
    with closing(RecordedSource(run, image=base)) as source, closing(source.base()) as disk:
        return disk.pread(0, disk.size)


def refused(run: Path) -> str:
    with pytest.raises(NbdproxyError) as caught:
        shown(run)
    return str(caught.value)


@pytest.mark.parametrize("end", [True, False], ids=["ended", "killed"])
def test_a_recording_made_here_finds_its_image(tmp_path: Path, secret: Path, *, end: bool) -> None:
    run = recorded(tmp_path, secret, end=end)
    assert shown(run) == SECRET
    run.rename(tmp_path / "moved")
    assert shown(tmp_path / "moved") == SECRET


@pytest.mark.parametrize("end", [True, False], ids=["ended", "killed"])
def test_a_copied_recording_asks_for_its_image(tmp_path: Path, secret: Path, *, end: bool) -> None:
    run = recorded(tmp_path, secret, end=end)
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    assert f"is a copy, or comes from elsewhere, and says that it builds on {secret}" in (
        refused(copied)
    )
    with pytest.raises(NbdproxyError, match="is a copy"):
        pack(copied, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert shown(copied, secret) == SECRET


def test_a_recording_of_another_user_asks_for_its_image(tmp_path: Path, secret: Path) -> None:
    run = recorded(tmp_path, secret)
    if os.geteuid() == 0:
        os.chown(run / "events", NOBODY, NOBODY)
        assert "comes from elsewhere" in refused(run)


def test_a_recording_that_does_not_say_where_it_was_made_asks(tmp_path: Path, secret: Path) -> None:
    run = recorded(tmp_path, secret)
    with RecordedSource(run) as source:
        source.meta = replace(source.meta, origin=None)
        with pytest.raises(NbdproxyError, match="comes from elsewhere"):
            source.base()


def test_a_forged_pack_without_a_base_shows_nothing_of_its_victim(
    tmp_path: Path, secret: Path
) -> None:
    run = recorded(tmp_path, secret, end=False)
    with Recording(run) as recording:
        pack_as_it_is(recording, tmp_path / "forged")
    unpack(tmp_path / "forged", tmp_path / "out")
    assert "unpack it again, or name its image with --base" in refused(tmp_path / "out")
    with pytest.raises(NbdproxyError, match="name its image with --base"):
        pack(tmp_path / "out", tmp_path / "packed")
    (tmp_path / "out" / "pack.json").unlink()
    assert "is a copy, or comes from elsewhere" in refused(tmp_path / "out")
    assert shown(tmp_path / "out", secret) == SECRET


@pytest.mark.parametrize("name", ["events", "data", "data.tail", "base", "pack.json"])
def test_a_link_in_a_recording_leads_nowhere(tmp_path: Path, secret: Path, name: str) -> None:
    run = recorded(tmp_path, secret)
    pack(run, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "out")
    assert shown(tmp_path / "out") == SECRET
    file = tmp_path / "out" / name
    if file.exists():
        file.rename(tmp_path / name)
        file.symlink_to(tmp_path / name)
    else:
        file.symlink_to(secret)
    assert "link" in refused(tmp_path / "out") or name == "base"


@pytest.mark.parametrize("name", ["files.sha256", "explore.db"])
def test_a_link_in_a_recording_is_not_packed(tmp_path: Path, secret: Path, name: str) -> None:
    run = recorded(tmp_path, secret)
    (run / name).symlink_to(secret)
    with pytest.raises(NbdproxyError, match=r"link"):
        pack(run, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, secret: Path) -> None:
    run = recorded(tmp_path, secret)
    layout.data_path(run).unlink()
    os.mkfifo(layout.data_path(run))
    assert "no plain file" in refused(run)


def test_the_schema_of_a_database_from_elsewhere_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "explore.db"
    Verdicts(path, {}, resume=False).close()
    with closing(sqlite3.connect(path)) as forged, forged:
        # SQLite keeps the worst functions from views anyway; this is one that it does not know.
        forged.execute("DROP TABLE state")
        forged.execute("CREATE VIEW state AS SELECT ours() AS verdict")
    with (
        closing(Verdicts(path, {}, resume=True)) as opened,
        pytest.raises(sqlite3.OperationalError, match="unsafe use of ours"),
    ):
        opened._db.create_function("ours", 0, lambda: 1)
        opened.count("verdict")

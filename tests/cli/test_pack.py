"""pack and unpack of real recordings: without its image, a recording gives the states it gave.

The recordings are made by `serve --record` and nbdsh, on an image that had data and holes. Not
covered: what is refused in an archive, and damage; see tests/recording/test_pack.py and
test_unpack.py. Guests are in the lab.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from nbdproxy.cli.pack import pack
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import ImageError
from tests.cli.conftest import Recorded
from tests.support.images import write_sparse
from tests.support.packs import contents, names, unseal
from tests.support.recorded_runs import MIB, SIZE, STATES, Run, digest, make, states_of
from tests.support.serving import COMMAND, Server, nbdproxy, tool
from tests.support.shell import nbdsh


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording that ended in order. Nobody may change it."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whose recorder was killed. Nobody may change it."""
    return make(tmp_path_factory.mktemp("killed"), kill=True)


@pytest.fixture(scope="module")
def file(made: Run) -> Path:
    """The recording, packed."""
    path = made.folder / "file"
    nbdproxy("pack", made.run, "-o", path)
    return path


@pytest.fixture
def away() -> Iterator[Callable[[Run], None]]:
    """Takes a recording and its image away until the test is over."""
    moved = []

    def take(run: Run) -> None:
        for path in (run.run, run.image):
            path.rename(path.with_suffix(".away"))
            moved.append(path)

    yield take
    for path in moved:
        path.with_suffix(".away").rename(path)


def run_in(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder of its own, because it names files in the current one."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def refused(*words: str | Path) -> str:
    """Run a command that must refuse; return its one sentence."""
    done = nbdproxy(*words, code=2)
    assert done.stdout == ""
    *notes, line = done.stderr.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert line.startswith("nbdproxy: ")
    return line


def test_the_states_are_many_and_need_the_image(made: Run) -> None:
    """Otherwise the tests below would prove little."""
    assert len(set(made.states.values())) > len(STATES) // 2
    wrong = made.folder / "zeroes"
    wrong.write_bytes(bytes(SIZE))
    found = states_of(made.run, wrong)
    assert all(found[one] != made.states[one] for one in STATES)


@pytest.mark.parametrize("which", ["made", "killed"])
def test_without_its_image_an_unpacked_recording_gives_the_same_states(
    which: str, request: pytest.FixtureRequest, away: Callable[[Run], None], tmp_path: Path
) -> None:
    run: Run = request.getfixturevalue(which)
    packed = tmp_path / "file"
    nbdproxy("pack", run.run, "-o", packed)
    away(run)
    nbdproxy("unpack", packed, "-o", tmp_path / "out")
    assert names(tmp_path) == ["file", "out"]
    assert states_of(tmp_path / "out") == run.states
    # Another image where the old one was changes nothing.
    run.image.write_bytes(b"\x5a" * SIZE)
    assert states_of(tmp_path / "out") == run.states
    nbdproxy("open", tmp_path / "out", "--state", STATES[3], "-o", tmp_path / "state")
    assert digest((tmp_path / "state").read_bytes()) == run.states[STATES[3]]
    # An image that is named is used, whatever came with the recording.
    assert states_of(tmp_path / "out", run.image) != run.states
    run.image.unlink()


def test_a_recording_under_an_overlay(tmp_path: Path) -> None:
    run = make(tmp_path, "--overlay")
    nbdproxy("pack", run.run, "-o", tmp_path / "file")
    run.image.unlink()
    nbdproxy("unpack", tmp_path / "file", "-o", tmp_path / "out")
    assert states_of(tmp_path / "out") == run.states


def test_every_command_that_reads_it_works_on_it(recorded: Recorded, tmp_path: Path) -> None:
    """An ext4, judged before with its image, and after without it."""
    inner = tmp_path / "inner"
    inner.mkdir()
    image = Path(shutil.copy2(recorded.image, inner / "image"))
    run = Path(shutil.copytree(recorded.run, inner / "run1"))
    words = ("--base", image, "--files", recorded.manifest)
    run_in(inner, "pack", run, *words)
    shutil.rmtree(run)
    image.unlink()
    run_in(inner, "unpack", "run1.nbdpack")
    shutil.move(recorded.image, tmp_path / "away")
    try:
        for command in (("info", "--verify"), ("log",)):
            assert nbdproxy(command[0], run, *command[1:]).stdout
        judged = nbdproxy("replay", run, "--files", run / "files.sha256", "--json", code=1)
        assert nbdproxy("manifest", f"{run}@end").stdout
        listed = ("--files", run / "files.sha256", "--states", "5", "--workers", "1")
        nbdproxy("explore", run, *listed, "--db", run / "explore.db", code=1)
    finally:
        shutil.move(tmp_path / "away", recorded.image)
    told = nbdproxy("replay", recorded.run, "--files", recorded.manifest, "--json", code=1)
    assert json.loads(judged.stdout)["cells"] == json.loads(told.stdout)["cells"]


def test_summaries(made: Run, tmp_path: Path) -> None:
    done = run_in(tmp_path, "pack", made.run, "--json")
    told = json.loads(done.stdout)
    assert done.stderr.startswith(f"packed {made.run} into run1.nbdpack: ")
    assert (told["file"], told["name"], told["size"]) == ("run1.nbdpack", "run1", SIZE)
    assert told["bytes"] == (tmp_path / "run1.nbdpack").stat().st_size
    assert told["members"]["events"] == told["events"] * 64
    found = run_in(tmp_path, "unpack", "run1.nbdpack", "--json")
    assert found.stderr == "unpacked run1.nbdpack to run1\n"
    again = json.loads(found.stdout)
    assert again.pop("recording") == "run1"
    assert again == {key: told[key] for key in again}
    assert names(tmp_path) == ["run1", "run1.nbdpack"]


def test_only_what_the_recording_lacks_is_packed_of_the_image(made: Run, file: Path) -> None:
    with closing(RecordedSource(made.run)) as source:
        saved = int(source.befores.length[source.befores.position >= 0].sum())
        data = sum(length for _, length in source.meta.data)
    stored = len(contents(unseal(file.read_bytes()))["base"])
    assert data - saved <= stored < data - saved + 4096
    assert saved > MIB // 2


def test_packing_is_the_same_wherever_and_whenever(made: Run, file: Path, tmp_path: Path) -> None:
    copied = made.copy(tmp_path)
    os.utime(copied / "data", (1, 1))
    # An image with the same data in another place.
    moved = Path(shutil.copy(made.image, tmp_path / "moved"))
    nbdproxy("pack", copied, "--base", moved, "-o", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    nbdproxy("unpack", file, "-o", tmp_path / "out")
    shutil.rmtree(copied)
    (tmp_path / "out").rename(copied)
    nbdproxy("pack", copied, "-o", tmp_path / "third")
    assert (tmp_path / "third").read_bytes() == file.read_bytes()
    assert b"root" not in unseal(file.read_bytes())[:512]


@pytest.mark.parametrize("which", ["made", "killed"])
def test_an_image_that_went_on_is_refused_as_open_refuses_it(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: Run = request.getfixturevalue(which)
    content, times = run.image.read_bytes(), run.image.stat()
    kept = Path(shutil.copy(run.image, tmp_path / "kept"))
    try:
        with run.image.open("r+b") as image:
            image.seek(SIZE - 512)
            image.write(b"later")
        later = times.st_mtime_ns + 3600 * 10**9
        os.utime(run.image, ns=(later, later))
        # What else came into the folder does not make the recording younger.
        (run.run / "files.sha256").touch()
        os.utime(run.run / "files.sha256", ns=(later, later))
        told = refused("pack", run.run, "-o", tmp_path / "file")
        assert "was changed after the recording ended" in told
        assert told == refused("open", run.run, "--at", "end", "-o", tmp_path / "state")
        assert names(tmp_path) == ["kept"]
        (run.run / "files.sha256").unlink()
        nbdproxy("pack", run.run, "--base", kept, "-o", tmp_path / "file")
    finally:
        (run.run / "files.sha256").unlink(missing_ok=True)
        run.image.write_bytes(content)
        os.utime(run.image, ns=(times.st_atime_ns, times.st_mtime_ns))
    nbdproxy("unpack", tmp_path / "file", "-o", tmp_path / "out")
    assert states_of(tmp_path / "out") == run.states


def test_an_image_that_is_changed_while_it_is_packed(
    made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where what was read was the same twice."""
    times = made.image.stat()

    def strike(_recording: object) -> None:
        """Stand in for the last step before the image is looked at again."""
        os.utime(made.image)

    monkeypatch.setattr("nbdproxy.recording.pack._check_still", strike)
    try:
        with pytest.raises(ImageError, match="was changed after the recording ended"):
            pack(made.run, tmp_path / "file")
    finally:
        os.utime(made.image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not names(tmp_path)


def test_an_image_that_is_gone_or_of_another_size(made: Run, tmp_path: Path) -> None:
    made.image.rename(tmp_path / "elsewhere")
    try:
        assert "is not there any more; name it" in refused("pack", made.run, "-o", tmp_path / "f")
    finally:
        (tmp_path / "elsewhere").rename(made.image)
    (tmp_path / "small").write_bytes(bytes(512))
    words = ("pack", made.run, "--base", tmp_path / "small", "-o", tmp_path / "f")
    assert "has 512 bytes, and the disk that was recorded" in refused(*words)
    assert names(tmp_path) == ["small"]


def test_an_unpacked_recording_that_lost_its_end_is_refused(file: Path, tmp_path: Path) -> None:
    """Before-images may be gone that the base does not hold."""
    nbdproxy("unpack", file, "-o", tmp_path / "out")
    events = tmp_path / "out" / "events"
    with events.open("r+b") as stream:
        stream.truncate(events.stat().st_size // 2)
    told = refused("open", tmp_path / "out", "--at", "seq:20", "-o", tmp_path / "state")
    assert "was lost after it was unpacked" in told
    (tmp_path / "out" / "pack.json").unlink()
    told = refused("open", tmp_path / "out", "--at", "seq:20", "-o", tmp_path / "state")
    assert "unpack the recording again" in told


def test_a_disk_of_a_tebibyte(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as huge:
        huge.truncate(1 << 40)
        for at in (0, 1 << 30, (1 << 40) - 8192):
            huge.seek(at)
            huge.write(b"\x77" * 8192)
    with Server(image, "--record", tmp_path / "run") as server:
        nbdsh("h.pwrite(b'x' * 4096, 1 << 30); h.flush(); tell(None)", uri=server.uri)
        assert server.stop() == 0
    nbdproxy("pack", tmp_path / "run", "-o", tmp_path / "file")
    image.unlink()
    assert (tmp_path / "file").stat().st_size < 10_000
    nbdproxy("unpack", tmp_path / "file", "-o", tmp_path / "out")
    base = (tmp_path / "out" / "base").stat()
    assert base.st_size == 1 << 40
    assert base.st_blocks * 512 < MIB
    with closing(RecordedSource(tmp_path / "out")) as source, closing(source.base()) as disk:
        for at in (0, 1 << 30, (1 << 40) - 8192):
            assert disk.pread(at, 8192) == b"\x77" * 8192
        assert disk.pread(1 << 39, 8192) == bytes(8192)


def test_a_guests_view_of_qcow2_is_packed_from_a_raw_copy(tmp_path: Path) -> None:
    raw = write_sparse(tmp_path / "raw", Random(3).randbytes(MIB))
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "disk.qcow2")
    run = tmp_path / "run"
    with Server(tmp_path / "disk.qcow2", "--format", "qcow2", "--record", run) as server:
        nbdsh("h.pwrite(b'x' * 4096, 8192); h.flush(); tell(None)", uri=server.uri)
        assert server.stop() == 0
    assert "qemu-img convert -f qcow2 -O raw" in refused("pack", run, "-o", tmp_path / "file")
    nbdproxy("pack", run, "--base", raw, "-o", tmp_path / "file")
    nbdproxy("unpack", tmp_path / "file", "-o", tmp_path / "out")
    nbdproxy("open", tmp_path / "out", "--at", "end", "-o", tmp_path / "state")
    content = raw.read_bytes()
    assert (tmp_path / "state").read_bytes() == content[:8192] + b"x" * 4096 + content[12288:]


def database(path: Path) -> sqlite3.Connection:
    """A database with the tables of `explore --db`, open, with rows in its log only."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript("CREATE TABLE about (key, value); CREATE TABLE state (id)")
    db.executemany("INSERT INTO state VALUES (?)", [(n,) for n in range(100)])
    return db


def test_a_manifest_and_a_database_are_packed_and_found(made: Run, tmp_path: Path) -> None:
    manifest = f"{'0' * 64}  /etc/hostname\n"
    (tmp_path / "files").write_text(manifest)
    added = ("--files", tmp_path / "files", "--db", tmp_path / "verdicts.db")
    with closing(database(tmp_path / "verdicts.db")):
        nbdproxy("pack", made.run, *added, "-o", tmp_path / "file")
    told = nbdproxy("unpack", tmp_path / "file", "-o", tmp_path / "run1").stderr
    assert "files.sha256" in told
    assert "explore.db" in told
    assert (tmp_path / "run1" / "files.sha256").read_text() == manifest
    with closing(sqlite3.connect(tmp_path / "run1" / "explore.db")) as db:
        assert db.execute("SELECT count(*) FROM state").fetchone() == (100,)
    for left in (tmp_path / "run1").glob("explore.db-*"):
        left.unlink()
    before = names(tmp_path / "run1")
    nbdproxy("pack", tmp_path / "run1", "-o", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    assert names(tmp_path / "run1") == before


def test_what_is_no_manifest_and_no_database(made: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"\0 nonsense")
    out = ("-o", tmp_path / "file")
    refused("pack", made.run, "--files", wrong, *out)
    assert "is no database of verdicts" in refused("pack", made.run, "--db", wrong, *out)
    assert "there is no database" in refused("pack", made.run, "--db", tmp_path / "no", *out)
    sqlite3.connect(tmp_path / "empty").execute("CREATE TABLE about (key)").connection.close()
    assert "name one that explore" in refused("pack", made.run, "--db", tmp_path / "empty", *out)
    assert names(tmp_path) == ["empty", "wrong"]


def test_a_recording_that_is_still_being_made(made: Run, tmp_path: Path) -> None:
    """Its image is in use; one below an overlay is not changed, so that it can be packed."""
    image = Path(shutil.copy(made.image, tmp_path / "image"))
    writes = "h.pwrite(b'x' * 4096, 8192); h.flush(); tell(None)"
    with Server(image, "--record", tmp_path / "run") as server:
        nbdsh(writes, uri=server.uri)
        told = refused("pack", tmp_path / "run", "-o", tmp_path / "file")
        assert "is in use by another nbdproxy" in told and "end that one first" in told
        assert server.stop() == 0
    with Server(image, "--record", tmp_path / "over", "--overlay") as server:
        nbdsh(writes, uri=server.uri)
        told = nbdproxy("pack", tmp_path / "over", "-o", tmp_path / "file").stderr
        assert "the recorder is still at work" in told
        assert server.stop() == 0
    nbdproxy("unpack", tmp_path / "file", "-o", tmp_path / "out")
    with closing(RecordedSource(tmp_path / "out")) as source, closing(source.base()) as disk:
        assert disk.pread(0, SIZE) == image.read_bytes()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_a_file_that_was_cut_off_is_told(file: Path, tmp_path: Path, keep: float) -> None:
    content = file.read_bytes()
    (tmp_path / "file").write_bytes(content[: int(len(content) * keep)])
    told = refused("unpack", tmp_path / "file", "-o", tmp_path / "out")
    assert "cut off" in told if keep else "is not a packed recording" in told
    assert names(tmp_path) == ["file"]


def test_what_exists_or_is_no_recording_is_refused(file: Path, made: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists; name a new folder" in refused("unpack", file, "-o", tmp_path / "out")
    assert "exists; name a new file" in refused("pack", made.run, "-o", file)
    assert "there is no recording" in refused("pack", tmp_path / "no", "-o", tmp_path / "f")
    assert "is a file; a recording is a folder" in refused("pack", file, "-o", tmp_path / "f")
    assert "cannot be read" in refused("unpack", tmp_path / "no", "-o", tmp_path / "new")
    assert names(tmp_path) == ["out"]

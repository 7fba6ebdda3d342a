"""What is written at a path: new, whole, its owner's alone, and in nobody else's folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from nbdproxy.cli.convert import convert
from nbdproxy.cli.extract import _make_folder
from nbdproxy.cli.open import OutputFormat, open_
from nbdproxy.cli.pack import pack, unpack
from nbdproxy.crash.explore.verdicts import Verdicts
from nbdproxy.disks.scratch import scratch_folder, temporary_folder
from nbdproxy.errors import LabError, NbdproxyError, TemporaryFolderError, UnsafeFolderError
from nbdproxy.lab.guest import dm_log
from nbdproxy.lab.guest.cache import LabCache
from nbdproxy.lab.guest.disk import format_disk
from nbdproxy.recording.foreign.formats import LogFormat
from nbdproxy.recording.writer import RecordingWriter
from tests.recording.example import ENDING, META, write
from tests.support.strangers import lay_open

Write = Callable[[Path, Path], object]
"""Writes something of a recording to a path."""


@pytest.fixture(autouse=True)
def _mask() -> Iterator[None]:
    """Without a mask, modes are what was asked for."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that needs no image."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    writer = RecordingWriter(path, replace(META, data=()))
    writer.completed(1, writer.received(1, [write(0, b"secrets." * 1024)]), 1, 0)
    writer.close(ENDING)
    return path


def opened(run: Path, output: Path, form: OutputFormat) -> None:
    with suppress(typer.Exit):
        open_(run, at="end", output=output, output_format=form)


def converted(run: Path, output: Path, to: LogFormat) -> None:
    with suppress(typer.Exit):
        convert(run, output, to=to)


def unpacked(run: Path, output: Path) -> None:
    packed = run.parent / "packed"
    if not packed.exists():
        pack(run, packed)
    unpack(packed, output)


def reconverted(run: Path, output: Path) -> None:
    log = run.parent / "log"
    if not log.exists():
        converted(run, log, LogFormat.DM_LOG_WRITES)
    converted(log, output, LogFormat.NBDPROXY)


WRITES: dict[str, Write] = {
    "open raw": lambda run, output: opened(run, output, OutputFormat.RAW),
    "open qcow2": lambda run, output: opened(run, output, OutputFormat.QCOW2),
    "pack": pack,
    "unpack": unpacked,
    "convert to dm-log-writes": lambda run, output: converted(run, output, LogFormat.DM_LOG_WRITES),
    "convert to nbd-trlog": lambda run, output: converted(run, output, LogFormat.NBD_TRLOG),
    "convert to nbdproxy": reconverted,
    "explore --db": lambda _, output: Verdicts(output, {}, resume=False).close(),
    "extract": lambda _, output: _make_folder(output),
    "lab format": lambda _, output: format_disk(output, 16 << 20),
    "lab run --write-log": lambda _, output: dm_log.prepare(output),
}
writes = pytest.mark.parametrize("make", WRITES.values(), ids=WRITES.keys())


@writes
def test_it_is_its_owners_alone(tmp_path: Path, run: Path, make: Write) -> None:
    make(run, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    for path in (tmp_path / "out", *(tmp_path / "out").glob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@writes
def test_it_is_not_written_to_a_folder_of_somebody_else(
    tmp_path: Path, run: Path, make: Write
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    lay_open(theirs)
    with pytest.raises(UnsafeFolderError):
        make(run, theirs / "out")
    assert not list(theirs.iterdir())


@writes
def test_a_link_in_its_place_leads_nowhere(tmp_path: Path, run: Path, make: Write) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "out").symlink_to(victim)
    for _ in range(2):  # to where there is nothing, and something
        with pytest.raises(NbdproxyError, match=r"exists|levels of symbolic links"):
            make(run, tmp_path / "out")
        victim.write_bytes(b"precious")
    assert victim.read_bytes() == b"precious"


def test_the_lab_builds_nothing_in_a_cache_of_somebody_else(tmp_path: Path) -> None:
    theirs = tmp_path / "cache"
    theirs.mkdir()
    lay_open(theirs)
    with pytest.raises(LabError, match=r"is not safe.*XDG_CACHE_HOME"), LabCache(theirs).locked():
        pass
    assert not list(theirs.iterdir())


def test_temporary_folders_are_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "temporary"
    theirs.mkdir()
    lay_open(theirs)
    monkeypatch.setenv("TMPDIR", str(theirs))
    for folder in (scratch_folder, temporary_folder):
        with pytest.raises(UnsafeFolderError):
            folder()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert temporary_folder() == "/tmp"
    with pytest.raises(TemporaryFolderError, match="make it, or set TMPDIR"):
        scratch_folder()

"""A recording that lost events: every command says so; of a lost end nothing is said to be well."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from tests.cli.conftest import Recorded, record
from tests.recording.example import ENDING, META, fill
from tests.support.ext4 import FLUSHED
from tests.support.serving import nbdproxy

SAYS = "cut off or damaged after event"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A recording of an ext4, all of which was flushed. Nobody may change it."""
    return record(tmp_path_factory.mktemp("whole"), flush_all=True)


@pytest.fixture(scope="module")
def lost(whole: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The same with one event flipped, of those behind the last flush. Nobody may change it."""
    folder = tmp_path_factory.mktemp("lost")
    run = Path(shutil.copytree(whole.run, folder / "run"))
    events = bytearray((run / "events").read_bytes())
    events[-2 * 64] ^= 1
    (run / "events").write_bytes(events)
    return Recorded(folder, run, whole.image, whole.manifest)


def words(command: str, one: Recorded, out: Path) -> list[str | Path]:
    run, files = ("--base", one.image), ("--files", one.manifest)
    found: dict[str, list[str | Path]] = {
        "info": ["info", one.run, "--verify"],
        "log": ["log", one.run],
        "check": ["check", one.run, *run, "--no-fsck"],
        "manifest": ["manifest", f"{one.run}@end", *run],
        "extract": ["extract", one.run, "/", "--at", "end", *run, "-o", out],
        "replay": [
            "replay",
            one.run,
            *files,
            *run,
            "--failure",
            "guest-reset",
            "--mode",
            "none",
            "--at",
            "end",
        ],
        "explain": ["explain", one.run, f"/{FLUSHED}", *run, "--at", "end", "--mode", "none"],
        "explain all": ["explain", one.run, *files, *run],
        "audit": ["audit", one.run, one.image],
        "explore": ["explore", one.run, *files, *run, "--at", "end", "--workers", "1"],
        "open": ["open", one.run, *run, "--at", "end", "-o", out],
        "pack": ["pack", one.run, *run, "-o", out],
        "convert": ["convert", one.run, out, "--to", "nbd-trlog"],
    }
    return found[command]


VERDICTS = ["info", "log", "check", "manifest", "extract", "replay", "explain", "explore"]
VERDICTS += ["explain all", "audit"]


@pytest.mark.parametrize("command", [*VERDICTS, "open", "pack", "convert"])
def test_every_command_says_what_is_missing(
    command: str, whole: Recorded, lost: Recorded, tmp_path: Path
) -> None:
    fine = nbdproxy(*words(command, whole, tmp_path / "a"))
    assert SAYS not in fine.stderr + fine.stdout
    code = 2 if command in VERDICTS else 0
    done = nbdproxy(*words(command, lost, tmp_path / "b"), code=code)
    assert (done.stdout if command in {"info", "audit"} else done.stderr).count(SAYS) == 1


def test_unpacking_says_what_was_missing_when_it_was_packed(lost: Recorded, tmp_path: Path) -> None:
    packed = tmp_path / "lost.nbdpack"
    nbdproxy("pack", lost.run, "--base", lost.image, "-o", packed)
    said = nbdproxy("unpack", packed, "-o", tmp_path / "out").stderr
    assert said.count(f"note: {SAYS}") == 1


def test_of_an_earlier_instant_all_is_well(lost: Recorded) -> None:
    assert SAYS in nbdproxy("log", lost.run, "--to", "seq:5").stderr
    earlier = ("--at", "seq:0", "--base", lost.image, "--no-fsck")
    assert SAYS in nbdproxy("check", lost.run, *earlier, code=None).stderr


def test_minimize_says_it(lost: Recorded) -> None:
    state = ("--state", "s0.completed.must", "--check", "false", "--base", str(lost.image))
    assert nbdproxy("minimize", lost.run, *state, code=None).stderr.count(SAYS) == 1


def test_an_event_that_is_damaged_below_a_tail(tmp_path: Path) -> None:
    """A killed recorder leaves half an event, and none that holds behind it."""
    live, run = tmp_path / "live", tmp_path / "run"
    writer = RecordingWriter(live, META)
    fill(writer)
    shutil.copytree(live, run)
    writer.close(ENDING)
    with Recording(run) as recording:
        assert not recording.is_damaged
        assert "until here all is there" in str(recording.missing)
    tail = bytearray((run / "events.tail").read_bytes())
    tail[4096 + 5 * 64] ^= 1
    (run / "events.tail").write_bytes(tail)
    with Recording(run) as recording:
        assert recording.events == 5
        assert recording.is_damaged
        assert SAYS in str(recording.missing)


def test_a_recording_without_its_end_and_without_a_tail(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = RecordingWriter(run, META)
    fill(writer)
    writer.close(ENDING)
    with (run / "events").open("r+b") as file:
        file.truncate((run / "events").stat().st_size - 64)
    with Recording(run) as recording:
        assert recording.is_damaged
        assert "until here all is there" not in str(recording.missing)

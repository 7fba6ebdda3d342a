"""What others wrote reaches no terminal as it is: marks, events, faults, paths; JSON is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.crash.explore.dask.cluster import say
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.writer import RecordingWriter
from tests.cli.conftest import Recorded
from tests.recording.example import ENDING, META, write
from tests.support.serving import nbdproxy

EVIL = "a\x1b[2J\nb\x9b\u202e[red]x[/] :bug: \udcff\t."
SHOWN = r"a\x1b[2J\nb\u009b\u202e[red]x[/] :bug: \xff\t."


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A recording in which every text that can be is evil."""
    run = tmp_path / "run"
    meta = replace(META, image=f"/{EVIL}", policies=(EVIL,), program=EVIL)
    writer = RecordingWriter(run, meta)
    writer.note(NoteKind.CONNECT, EVIL, connection=1)
    writer.completed(1, writer.received(1, [write(0, bytes(512))]), 1, 0)
    for text in (EVIL, json.dumps({"action": EVIL, "rule": EVIL}), json.dumps({"action": EVIL})):
        for kind in (NoteKind.MARK, NoteKind.QMP, NoteKind.FAULT, NoteKind.POLICY):
            writer.note(kind, text)
    writer.close(replace(ENDING, reason=EVIL))
    return run


def only_shows(text: str) -> None:
    """Check that nothing in an output steers a terminal."""
    assert {c for c in text if unicodedata.category(c)[0] == "C"} <= {"\n"}


@pytest.mark.parametrize("command", ["log", "info"])
def test_a_foreign_recording_steers_no_terminal(hostile: Path, command: str) -> None:
    said = nbdproxy(command, hostile).stdout
    only_shows(said)
    assert SHOWN in said


def test_json_has_the_text_as_it_is(hostile: Path) -> None:
    lines = nbdproxy("log", hostile, "--type", "mark", "--json").stdout.splitlines()
    assert json.loads(lines[0])["text"] == EVIL
    assert json.loads(nbdproxy("info", hostile, "--json").stdout)["notes"][0]["text"] == EVIL


def evil_manifest(folder: Path) -> Path:
    file = folder / "files"
    name = EVIL.replace("\n", "\\n").encode(errors="surrogateescape")
    file.write_bytes(b"\\" + b"0" * 64 + b"  /" + name + b"\n")
    return file


def test_names_of_files_steer_no_terminal(recorded: Recorded, tmp_path: Path) -> None:
    files = evil_manifest(tmp_path)
    listed = ("--files", files, "--root", "/")
    shown = [
        nbdproxy("replay", recorded.run, *listed, code=1).stdout,
        nbdproxy("check", recorded.run, *listed, "--list", "--no-fsck", code=1).stdout,
        nbdproxy("explain", recorded.run, f"/{EVIL}", *listed, code=1).stdout,
    ]
    for said in shown:
        only_shows(said)
    for said in shown[1:]:
        assert f"/{SHOWN}" in said
    lines = nbdproxy("replay", recorded.run, *listed, "--list", code=1).stdout.splitlines()
    fields = [line.split("\t") for line in lines if "\t" in line]
    assert {(len(one), one[-1]) for one in fields} == {(5, f"/{SHOWN}")}
    told = nbdproxy("replay", recorded.run, *listed, "--list", "--json", code=1).stdout
    assert f"/{EVIL}" in json.loads(told)["cells"][0]["worst"]["files"]
    [story] = json.loads(
        nbdproxy("explain", recorded.run, f"/{EVIL}", *listed, "--json", code=1).stdout
    )
    assert story["path"] == f"/{EVIL}"


def test_a_manifest_steers_no_terminal_and_is_exact_in_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a\x1b[2Jb").write_bytes(b"")
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "nbdproxy", "manifest", str(folder)]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=theirs, check=True, timeout=60)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert r"a\x1b[2Jb" in shown
    assert "\x1b[2J" not in shown
    assert "a\x1b[2Jb" in nbdproxy("manifest", folder).stdout


def test_errors_and_logs_steer_no_terminal(recorded: Recorded, tmp_path: Path) -> None:
    done = nbdproxy("log", recorded.run, "--from", f"mark:{EVIL}", code=2)
    only_shows(done.stderr)
    only_shows(nbdproxy("serve", tmp_path / EVIL, code=2).stderr)
    only_shows(nbdproxy("info", tmp_path / EVIL, code=2).stderr)


def test_only_json_is_on_stdout_where_workers_serve_states(recorded: Recorded) -> None:
    check = ("--check", 'nbdinfo "$uri" && echo loudly', "--workers", "2", "--states", "8")
    done = nbdproxy("explore", recorded.run, *check, "--json", timeout_s=60)
    assert json.loads(done.stdout)["verdicts"]["pass"] > 1


def test_no_log_goes_to_stdout_whichever_process_it_is_in() -> None:
    code = "from nbdproxy.server.front.listener import log; log.info('little'); log.warning('much')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "much" in done.stderr
    assert "little" not in done.stderr


def test_what_workers_say_steers_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    say(f"the worker at {EVIL} failed: {EVIL}")
    only_shows(capfd.readouterr().err)


def test_a_log_line_of_a_process_that_was_not_set_up_steers_no_terminal() -> None:
    code = f"from nbdproxy.server.front.listener import log; log.warning('much', peer={EVIL!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    only_shows(done.stderr)
    assert "much" in done.stderr

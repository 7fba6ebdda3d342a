"""A full disk: nothing passes unrecorded from then on, and what was recorded stays readable.

The full disk is RLIMIT_FSIZE in a process of its own, which works without root: the drain thread
gets EFBIG as it would get ENOSPC. The export's side of it is in tests of the server.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from nbdproxy.errors import RecordingFullError
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.writer import RecordingWriter
from tests.recording.example import META

LIMIT = 18 * 1024 * 1024
"""More than the data tail has (16 MiB), less than what is recorded."""

WRITES = 64 * 1024
CHILD = f"""
import json, resource, sys
from pathlib import Path
from nbdproxy.errors import RecordingFullError
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.writer import RecordingWriter
from tests.recording.example import ENDING, META, write

def fails(call):
    try:
        call()
    except RecordingFullError as error:
        return str(error)
    return None

resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
writer = RecordingWriter(Path(sys.argv[1]), META)
answered, message = 0, None
while message is None and answered < 2000:
    batch = [write(0, bytes([answered % 256]) * {WRITES})]
    def record():
        global answered
        first = writer.received(1, batch)
        writer.completed(1, first, 1, 0)
        answered += 1
    message = fails(record)
    writer.wait_for_room({WRITES})
later = [
    fails(lambda: writer.received(1, batch)),
    fails(lambda: writer.completed(1, 1, 1, 0)),
    fails(lambda: writer.before(0, b"x" * 512)),
    fails(lambda: writer.before(0, bytes(512))),
    fails(lambda: writer.refused(1, batch[0], 22)),
    fails(lambda: writer.note(NoteKind.MARK)),
]
print(json.dumps([answered, message, later, fails(lambda: writer.close(ENDING))]))
"""


def test_a_full_disk_stops_the_recording_and_keeps_what_was_recorded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(run)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answered, message, later, at_close = json.loads(done.stdout)
    assert LIMIT // WRITES - 50 < answered < 2000
    for sentence in (message, *later, at_close):
        assert sentence is not None
        assert "cannot grow" in sentence
        assert "ulimit -f" in sentence
    recording = Recording(run)
    assert recording.missing is not None
    assert not recording.truncated
    table = recording.table
    assert (table.completed != NEVER).sum() >= answered
    recording.verify()
    for row in range(answered):
        buffer = bytearray(WRITES)
        recording.read_payload(int(table.position[row]), memoryview(buffer))
        assert buffer == bytes([row % 256]) * WRITES
    recording.close()


def test_no_recording_begins_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5 * 1024 * 1024))
    with pytest.raises(RecordingFullError, match="only 5 MiB are free"):
        RecordingWriter(tmp_path / "run", META)


def test_a_tail_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    limited = CHILD.replace(f"({LIMIT}, {LIMIT})", "(1024 * 1024, 1024 * 1024)")
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path / "run")],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "RecordingFullError" in done.stderr
    assert "cannot grow" in done.stderr

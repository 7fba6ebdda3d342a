"""The guest's lines as marks in the recording: what was promised holds at each of them."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import CrashDisk, open_state
from nbdproxy.errors import LabError
from nbdproxy.lab import sqlite_image
from nbdproxy.lab.guest import disk
from nbdproxy.lab.sqlite_image import LOST, SOUND
from nbdproxy.lab.workloads.marks import Marker, mark_of
from nbdproxy.persistence.model import Level
from nbdproxy.recording.notes import NoteKind
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy

MIB = 1 << 20


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("committed 7", "committed-7"),
        ("committed 12 ", "committed-12"),
        ("mark old-synced", "old-synced"),
        ("it was committed 7", None),
        ("committed", None),
        ("committed 7 [    3.1] EXT4-fs error", None),
        ("mark two words", None),
        ("mark " + "x" * 201, None),
        ("@lab finished 0", None),
        ("", None),
    ],
)
def test_which_lines_ask_for_a_mark(line: str, name: str | None) -> None:
    assert mark_of(line) == name


@contextmanager
def listening(path: Path, answers: list[bytes]) -> Iterator[list[str]]:
    """Answer so many commands, then hang up; yields the names of the marks that were asked for."""
    asked: list[str] = []

    def serve() -> None:
        client, _ = server.accept()
        with client, client.makefile("rb") as lines:
            for answer in answers:
                asked.append(json.loads(lines.readline())["name"])
                client.sendall(answer)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join()


@pytest.mark.parametrize(
    ("last", "trouble"),
    [
        (b'{"ok": false, "error": "the power is off"}\n', "the power is off"),
        (b"", "gone|reset"),
        (b"{nothing\n", "mark three is not in the recording"),
    ],
)
def test_the_first_mark_that_is_refused_is_the_last(
    tmp_path: Path, last: bytes, trouble: str
) -> None:
    fine = b'{"ok": true}\n'
    with (
        listening(tmp_path / "ctl", [fine, fine, last]) as asked,
        Marker(tmp_path / "ctl") as marker,
    ):
        for line in ("mark one", "something else", "committed 2", "mark three", "mark four"):
            marker(line)
        assert marker.marked == 2
        assert re.search(trouble, str(marker.trouble))
    assert asked == ["one", "committed-2", "three"]


def test_a_socket_where_nobody_listens_is_told(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="serve --control"):
        Marker(tmp_path / "ctl")


def write_image(state: CrashDisk, path: Path) -> None:
    """Write a state as a sparse file."""
    with path.open("wb") as file:
        file.truncate(state.size)
        for extent in state.data_extents(0, state.size):
            file.seek(extent.offset)
            file.write(state.pread(extent.offset, extent.length))
    state.close()


@pytest.mark.lab
@pytest.mark.parametrize(
    ("workload", "count", "may_lose"), [("sqlite-wal-full", 50, 0), ("sqlite-full", 50, 1)]
)
def test_what_was_told_is_there_in_the_worst_state_at_its_mark(
    tmp_path: Path, workload: str, count: int, may_lose: int
) -> None:
    image, control = tmp_path / "disk.img", tmp_path / "ctl"
    disk.format_disk(image, 64 * MIB)
    with ForkedServer(
        tmp_path, image, "--record", tmp_path / "run", "--control", control
    ) as server:
        uri = f"nbd+unix:///?socket={server.socket}"
        done = nbdproxy("lab", "run", workload, uri, "--control", control, timeout_s=200)
        assert f"{count} marks are in the recording" in done.stderr
        nbdproxy("ctl", control, "mark", "later")
        server.signal(15)
        assert server.wait() == 0, server.log
    source = RecordedSource(tmp_path / "run")
    marks = [note.text for note in source.notes if note.kind is NoteKind.MARK]
    assert marks == [*(f"committed-{number}" for number in range(1, count + 1)), "later"]
    state_image = tmp_path / "state.img"
    for number in range(1, count + 1, 7):
        position = resolve(source, f"mark:committed-{number}").position
        # Judged as if all had been promised, an early state tells that it is not simply the last.
        # By how many commits a mark comes late depends on how busy the machine is.
        for promised, code in ((number, SOUND), (count + 2 * (number > count // 2), LOST)):
            state = StateId(position, Level.FLUSHED, Choice.MUST)
            write_image(open_state(source, state), state_image)
            found = sqlite_image.judge(state_image, committed=promised, may_lose=may_lose)
            assert found[0] == code, (number, promised, found)
    source.close()

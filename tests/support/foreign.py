"""For tests of `convert`: the command itself, recordings made up, and a replayer of our own.

The replayer knows dm-log-writes from its description only and imports nothing of the reader, so
that both cannot share a mistake. It stands in for `replay-log` of xfstests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import typer
from hypothesis import strategies as st
from typer.testing import CliRunner

from nbdproxy.cli.convert import convert as command
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.errors import NbdproxyError
from nbdproxy.persistence.model import Level
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command, CommandFlag, Request

SECTOR = 512
SECTORS = 16
SIZE = SECTOR * SECTORS
NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    stdout: str
    stderr: str


def convert(*words: str | Path, code: int = 0) -> Outcome:
    """Run `nbdproxy convert` to its end; fails on another exit code."""
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(word) for word in words])
    stderr, ended = done.stderr, done.exit_code
    if isinstance(done.exception, NbdproxyError):
        stderr, ended = f"{stderr}nbdproxy: {done.exception}\n", 2
    elif done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert ended == code, (ended, done.stdout, stderr)
    return Outcome(ended, done.stdout, stderr)


class Step(NamedTuple):
    """A request to make up, in sectors; `fill` is the byte that a WRITE is full of."""

    command: Command
    first: int = 0
    sectors: int = 0
    fua: bool = False
    fill: int = 0

    def request(self, cookie: int = 0) -> Request:
        """Return it as the server would hand it on."""
        flags = int(CommandFlag.FUA) if self.fua else 0
        length = self.sectors * SECTOR
        payload = NOTHING
        if self.command is Command.WRITE:
            payload = memoryview(bytes([self.fill]) * length)
        return Request(self.command, flags, cookie, self.first * SECTOR, length, payload)


class Answer(NamedTuple):
    """The reply to the step of that number."""

    number: int
    error: int = 0


class Mark(NamedTuple):
    """A mark."""

    text: str


Log = Sequence[Step | Answer | Mark]


def serial(steps: Sequence[Step | Mark]) -> list[Step | Answer | Mark]:
    """Answer each request before the next one."""
    log: list[Step | Answer | Mark] = []
    number = 0
    for step in steps:
        log.append(step)
        if isinstance(step, Step):
            log.append(Answer(number))
            number += 1
    return log


def record(run: Path, log: Log, *, base: Path | None = None, size: int = SIZE) -> Path:
    """Make a recording on a base image, or on zeroes, that was never written."""
    meta = Meta(
        size=size,
        image="/dev/zero" if base is None else str(base),
        overlay=True,
        data=() if base is None else ((0, size),),
        base=Fingerprint(size, 0) if base is None else Fingerprint.of(base),
        policies=("passthrough",),
        started="2026-01-01T00:00:00.000+00:00",
        program="nbdproxy test",
    )
    writer = RecordingWriter(run, meta)
    seqs: list[int] = []
    for item in log:
        if isinstance(item, Step):
            seqs.append(writer.received(1, [item.request(cookie=len(seqs))]))
        elif isinstance(item, Answer):
            writer.completed(1, seqs[item.number], 1, item.error)
        else:
            writer.note(NoteKind.MARK, item.text)
    writer.close(Ending("the test ended", None))
    return run


@st.composite
def steps(draw: st.DrawFn, commands: Sequence[Command]) -> Step:
    """A request that fits on the disk."""
    chosen = draw(st.sampled_from(commands))
    if chosen is Command.FLUSH:
        return Step(chosen)
    first = draw(st.integers(0, SECTORS - 1))
    count = draw(st.integers(1, min(4, SECTORS - first)))
    return Step(chosen, first, count, draw(st.booleans()), draw(st.integers(0, 255)))


COMMANDS = (Command.WRITE, Command.WRITE, Command.FLUSH, Command.WRITE_ZEROES, Command.TRIM)


@st.composite
def concurrent(draw: st.DrawFn) -> list[Step | Answer | Mark]:
    """Requests and replies in any order that time allows; some fail, some are never answered."""
    log: list[Step | Answer | Mark] = []
    waiting: list[int] = []
    number = 0
    for _ in range(draw(st.integers(0, 24))):
        answers: bool = draw(st.booleans())
        if waiting and answers:
            answered = draw(st.sampled_from(waiting))
            waiting.remove(answered)
            log.append(Answer(answered, draw(st.sampled_from((0, 0, 0, 5)))))
        else:
            log.append(draw(steps(COMMANDS)))
            waiting.append(number)
            number += 1
    return log


def state(
    run: Path,
    position: int,
    *,
    level: Level = Level.FLUSHED,
    choice: Choice = Choice.MUST,
    base: Path | None = None,
) -> bytes:
    """Return a whole crash state of a recording."""
    source = RecordedSource(run, image=base)
    disk = open_state(source, StateId(position, level, choice))
    content = disk.pread(0, disk.size)
    disk.close()
    source.close()
    return content


def end(run: Path, base: Path | None = None) -> bytes:
    """Return the disk after all that was sent."""
    source = RecordedSource(run, image=base)
    position = resolve(source, "end").position
    source.close()
    return state(run, position, level=Level.RECEIVED, choice=Choice.ALL, base=base)


def flushes(run: Path) -> list[tuple[int, int]]:
    """Return the seq of each flush that succeeded and the position behind its reply."""
    source = RecordedSource(run)
    table = source.table
    rows = table.is_flush & (table.error == 0) & (table.completed != NEVER)
    found = zip(table.seq[rows].tolist(), (table.completed[rows] + 1).tolist(), strict=True)
    source.close()
    return list(found)


def flushed(run: Path, base: Path | None = None) -> list[bytes]:
    """Return what must be there behind each flush that succeeded, in the order received."""
    return [state(run, behind, base=base) for _, behind in flushes(run)]


def replay_log(
    log: Path, disk: bytearray, on_flush: Callable[[bytes], None] = lambda _: None
) -> list[str]:
    """Carry a dm-log-writes log out on `disk`; return its marks.

    `on_flush` is given the disk at each flush.
    """
    raw = log.read_bytes()
    magic, version, count, sector = struct.unpack_from("<QQQI", raw)
    assert (magic, version) == (0x6A736677736872, 1)
    assert not any(raw[28:sector])
    at, marks = sector, []
    for _ in range(count):
        where, many, flags, text = struct.unpack_from("<QQQQ", raw, at)
        if flags == 8:
            marks.append(raw[at + 32 : at + 32 + text].decode())
            assert many == 0
            at += sector
            continue
        assert flags or many, "replay-log takes an entry of zeroes for damage"
        assert not any(raw[at + 32 : at + sector]), "nor does it take one that is not padded"
        at += sector
        if flags & 1:
            on_flush(bytes(disk))
        start, length = where * sector, many * sector
        if flags & 4:
            disk[start : start + length] = bytes(length)
        else:
            assert at + length <= len(raw)
            disk[start : start + length] = raw[at : at + length]
            at += length
    assert at == len(raw), "something stands behind the last entry"
    return marks

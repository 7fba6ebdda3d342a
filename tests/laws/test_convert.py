"""Laws of conversion: what `docs/formats.md` says is lost is lost, and nothing else is.

Recordings of any requests, serial or concurrent, failed and unanswered ones among them, go to
another format and come back. Not covered: real programs as partners (`tests/interop`), and logs
that are damaged (`tests/recording`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.persistence.model import Level
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording
from nbdproxy.requests import Command
from tests.support.foreign import (
    COMMANDS,
    SIZE,
    Answer,
    Mark,
    Step,
    concurrent,
    convert,
    end,
    flushed,
    flushes,
    record,
    replay_log,
    serial,
    state,
    steps,
)

law = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
marks = st.builds(Mark, st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9))
serial_steps = st.lists(st.one_of(steps(COMMANDS), steps(COMMANDS), marks), max_size=16)
BASE = bytes(range(1, 255)) * (SIZE // 254 + 1)


def there_and_back(folder: Path, log: list[Step | Answer | Mark], form: str) -> tuple[str, Path]:
    """Record on a base, convert, convert back; return what was said on the way there."""
    base = folder / "base"
    base.write_bytes(BASE[:SIZE])
    record(folder / "run", log, base=base)
    told = convert(folder / "run", folder / "log", "--to", form)
    convert(folder / "log", folder / "back", "--to", "nbdproxy", "--base", base)
    return told.stderr, base


@law
@given(serial_steps)
def test_serial_requests_keep_the_state_at_each_flush_in_dm_log_writes(
    made: list[Step | Mark],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told, base = there_and_back(folder, serial(made), "dm-log-writes")
        expected = flushed(folder / "run")
        assert flushed(folder / "back") == expected
        seen: list[bytes] = []
        disk = bytearray(base.read_bytes())
        texts = replay_log(folder / "log", disk, seen.append)
        assert seen == expected
        assert end(folder / "run") == end(folder / "back") == bytes(disk)
        ours = [mark.text for mark in made if isinstance(mark, Mark)]
        assert texts == [*ours, "dm-log-writes-end"]
        assert _marks(folder / "back") == ours
        assert "left out" not in told
        words = ("--to", "nbd-trlog", "--base", base, "--verify", folder / "end")
        (folder / "end").write_bytes(disk)
        convert(folder / "log", folder / "other", *words)
        convert(folder / "other", folder / "last", "--to", "nbdproxy", "--base", base)
        assert flushed(folder / "last") == expected


@law
@given(concurrent())
def test_concurrent_requests_keep_what_each_flush_covers_in_dm_log_writes(
    log: list[Step | Answer | Mark],
) -> None:
    """Just behind the reception of a flush that succeeds, its covers and no more are listed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told, _ = there_and_back(folder, log, "dm-log-writes")
        late = _late(folder / "run")
        assert ("completed after an overlapping later one" in told) == (late > 0)
        assert not late or f"note: {late} write" in told
        if not late:
            level = Level.FLUSHED_OR_FLUSHING
            covered = [
                state(folder / "run", at + 1, level=level) for at, _ in flushes(folder / "run")
            ]
            assert flushed(folder / "back") == covered


def _late(run: Path) -> int:
    """Count, slowly, the writes that an overlapping later one overtook."""
    source = Recording(run)
    table = source.table
    source.close()
    rows = [
        row
        for row in range(len(table))
        if table.completed[row] != NEVER and not table.error[row] and not table.is_flush[row]
    ]
    return sum(
        any(
            later > row
            and table.completed[later] < table.completed[row]
            and table.offset[later] < table.offset[row] + table.length[row]
            and table.offset[row] < table.offset[later] + table.length[later]
            for later in rows
        )
        for row in rows
    )


@law
@given(concurrent())
def test_a_transaction_log_keeps_everything_but_failed_writes(
    log: list[Step | Answer | Mark],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told, _ = there_and_back(folder, log, "nbd-trlog")
        failed = {item.number for item in log if isinstance(item, Answer) and item.error}
        made = [step for step in log if isinstance(step, Step)]
        lost = [n for n in failed if made[n].command is not Command.FLUSH]
        assert (f"{len(lost)} request" in told and "answered with an error" in told) == bool(lost)
        assert end(folder / "back") == end(folder / "run")
        assert flushed(folder / "back") == flushed(folder / "run")
        assert _requests(folder / "back") == [
            (int(step.command), step.fua, step.first * 512, step.sectors * 512, n in failed)
            for n, step in enumerate(made)
            if n not in lost
        ]


def _requests(run: Path) -> list[tuple[int, bool, int, int, bool]]:
    recording = Recording(run)
    table = recording.table
    recording.close()
    columns = (table.command, table.flags & 1, table.offset, table.length, table.error)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(command, bool(fua), at, count, bool(error)) for command, fua, at, count, error in rows]


def _marks(run: Path) -> list[str]:
    recording = Recording(run)
    recording.close()
    return [note.text for note in recording.notes if note.kind is NoteKind.MARK]


@law
@given(concurrent(), st.sampled_from(["dm-log-writes", "nbd-trlog"]))
def test_verify_tells_one_changed_byte(log: list[Step | Answer | Mark], form: str) -> None:
    """Except where a TRIM was last: what a trimmed place holds is up to the store."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, base = there_and_back(folder, log, form)
        content = bytearray(end(folder / "back"))
        image = folder / "image"
        image.write_bytes(content)
        verify = ("--base", base, "--verify", image, "--json")
        done = convert(folder / "log", folder / "one", "--to", "nbdproxy", *verify)
        assert json.loads(done.stdout)["verified"] is True
        content[4097] ^= 1
        image.write_bytes(content)
        trimmed = _is_trimmed(folder / "back", 4097)
        code = 0 if trimmed else 1
        done = convert(folder / "log", folder / "two", "--to", "nbdproxy", *verify, code=code)
        told = json.loads(done.stdout)
        assert (told["difference"], told["trimmed"]) == ((None, 1) if trimmed else (4097, 0))
        assert RecordedSource(folder / "two").ending is not None


def _is_trimmed(run: Path, at: int) -> bool:
    last = [
        command
        for command, _, offset, length, failed in _requests(run)
        if not failed and offset <= at < offset + length
    ]
    return last[-1:] == [Command.TRIM]

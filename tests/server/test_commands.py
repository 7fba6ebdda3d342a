"""The judge that runs a command: what its exit code means, what it sees, and how it ends."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nbdproxy.crash.explore.judging import Judge, Judgement
from nbdproxy.crash.states.naming import parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.requests import Command
from nbdproxy.state_server.commands import CommandPlan, last_mark
from tests.server.test_states import DISKS, SECTOR, SIZE, make_timeline
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received, table_of
from tests.support.serving import until

Judged = tuple[Judgement, ExtentSet | None]
Run = Callable[..., Judged]
BUT = "s9.flushed.but4"
NBDSH = 'PATH="$(dirname "$(command -v nbdsh)"):$PATH" nbdsh'
"""Its own module is that of the interpreter beside it."""


@pytest.fixture
def timeline() -> Iterator[Timeline]:
    """The made-up recording."""
    made = make_timeline()
    yield made
    made.close()


@pytest.fixture
def run(timeline: Timeline) -> Iterator[Run]:
    """Judge a state by a command."""
    judges: list[Judge] = []

    def judge(command: str, state: str = BUT, *, time_limit_s: float = 30) -> Judged:
        judges.append(CommandPlan(command, time_limit_s).open(timeline))
        judgement, told = judges[-1].judge(parse_state_id(state), None)
        reads = ExtentSet()
        for extent in told or ():
            reads.add(extent.offset, extent.end)
        return judgement, None if told is None else reads

    yield judge
    for one in judges:
        one.close()


def test_a_signal_just_when_a_command_begins_ends_the_command_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *words: object, **options: object) -> None:
            super().__init__(*words, **options)  # type: ignore[call-overload]
            begun.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("nbdproxy.state_server.commands.subprocess.Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("sleep 300")
    [pid] = begun
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process is there, and is more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("command", "verdict", "reason"),
    [
        ("true", Verdict.PASS, None),
        ("exit 1", Verdict.FAIL, None),
        ("echo one; echo two >&2; exit 1", Verdict.FAIL, "two"),
        ("echo fine; echo", Verdict.PASS, "fine"),
        ("exit 2", Verdict.UNKNOWN, "exit code 2"),
        ("echo oh no; exit 3", Verdict.UNKNOWN, "exit code 3: oh no"),
        ("no-such-program-anywhere", Verdict.UNKNOWN, "exit code 127"),
        ("kill -9 $$", Verdict.UNKNOWN, "killed by SIGKILL"),
        ("echo last words; kill -TERM $$", Verdict.UNKNOWN, "killed by SIGTERM: last words"),
        ("exit 255", Verdict.UNKNOWN, "exit code 255"),
    ],
)
def test_what_an_exit_code_means(
    run: Run, command: str, verdict: Verdict, reason: str | None
) -> None:
    judgement, _ = run(command)
    assert judgement.verdict is verdict
    assert judgement.reason == reason or (reason or "?") in str(judgement.reason)


def test_a_signal_that_has_no_name_is_unknown_too(run: Run) -> None:
    judgement, _ = run("kill -40 $$")
    assert judgement.verdict is Verdict.UNKNOWN


def test_any_bytes_may_be_printed(run: Run) -> None:
    judgement, _ = run(r"printf 'caf\351 \000\033[31m%0900d' 7; exit 1")
    assert judgement.verdict is Verdict.FAIL
    assert len(str(judgement.reason)) <= 300
    judgement, _ = run("head -c 3000000 /dev/zero | tr '\\0' a; echo; echo the end; exit 1")
    assert judgement.reason == "the end"


def test_what_a_command_is_told(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(f'echo "$state $position [$mark]" > {out}; head -c 1 | wc -c >> {out}')
    assert out.read_text().split() == [BUT, "9", "[two]", "0"]
    run(f'echo "$state $position [$mark]" > {out}', "s3.flushed.must")
    assert out.read_text() == "s3.flushed.must 3 []\n"
    run(f'echo "$state $position [$mark]" > {out}', "s4.flushed.must")
    assert out.read_text() == "s4.flushed.must 4 [half way]\n"


def test_the_last_mark_before_a_cut(timeline: Timeline) -> None:
    marks = [last_mark(timeline, position) for position in range(10)]
    assert marks == ["", "", "", "", *["half way"] * 5, "two"]


def test_the_context_is_what_a_command_is_told_besides_the_disk(timeline: Timeline) -> None:
    def contexts(command: str) -> list[str]:
        plan = CommandPlan(command, 1)
        states = [parse_state_id(f"s{position}.flushed.must") for position in (0, 3, 4, 8, 9)]
        return [plan.context(timeline, state) for state in states]

    marks = contexts("./a-script-that-may-look-at-the-mark")
    assert marks[0] == marks[1] != marks[2] == marks[3] != marks[4]
    assert marks == contexts("check ${mark}") == contexts("check $positions")
    assert len(set(contexts("check $position"))) == 5
    assert len(set(contexts("check ${state}"))) == 5


def test_what_a_command_does_not_name_it_is_not_told(run: Run, tmp_path: Path) -> None:
    """A script that could see it would depend on it, and nobody would know."""
    out = tmp_path / "out"
    script = tmp_path / "script"
    script.write_text(f"env > {out}\n")
    run(f"sh {script}")
    names = {line.partition("=")[0] for line in out.read_text().splitlines()}
    assert names >= {"uri", "mark"}
    assert not names & {"state", "position", "image"}


def test_only_a_pass_or_a_fail_is_shared_and_only_by_what_was_read(run: Run) -> None:
    for command in ("exit 0", "exit 1"):
        assert run(command)[1] is not None
    for command in ("exit 2", "kill -9 $$", 'test "$state" = x'):
        assert run(command)[1] is None


def test_a_state_as_an_export_that_may_be_written(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f"""
    nbdcopy "$uri" {out} && {NBDSH} -u "$uri" -c 'h.pwrite(b"x" * 512, 512); h.flush()' &&
    nbdcopy "$uri" {out}2
    """
    judgement, reads = run(command)
    assert judgement.verdict is Verdict.PASS, judgement.reason
    expected = b"".join(bytes([value]) * SECTOR for value in DISKS[BUT])
    assert out.read_bytes() == expected
    assert out.with_name("out2").read_bytes() == expected, "a new connection is a new overlay"
    assert reads is not None
    # Where the disk reads as zeroes a client may learn that without reading.
    assert reads.covers(SECTOR, SIZE)


def test_what_was_read_is_told(run: Run) -> None:
    code = "h.pread(512, 1024); h.pread(1024, 2560); h.pwrite(b'x' * 512, 0); h.pread(512, 0)"
    judgement, reads = run(f'{NBDSH} -u "$uri" -c "{code}"', "s9.flushed.must")
    assert judgement.verdict is Verdict.PASS, judgement.reason
    assert reads is not None
    assert list(reads) == [Extent(1024, 512), Extent(2560, 1024)]
    _, reads = run("exit 1")
    assert reads is not None
    assert reads.total() == 0


def test_a_state_as_a_file_that_may_be_changed(run: Run, tmp_path: Path) -> None:
    out, name = tmp_path / "out", tmp_path / "name"
    judgement, reads = run(
        f'cp "$image" {out} && echo "$image" > {name} && echo changed > "${{image}}" && '
        'truncate -s 9 "$image"'
    )
    assert judgement.verdict is Verdict.PASS, judgement.reason
    assert reads is None, "nothing is known of what was read of it"
    expected = b"".join(bytes([value]) * SECTOR for value in DISKS[BUT])
    assert out.read_bytes() == expected
    assert not Path(name.read_text().strip()).exists()
    run(f'cmp "$image" {out}')
    judgement, _ = run(f'cmp "$image" {out}')
    assert judgement.verdict is Verdict.PASS, "the next one is a new file"


def test_no_image_is_made_unless_it_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")
    judgement, reads = run('test -z "$imagery" && test -n "$uri"')
    assert judgement.verdict is Verdict.PASS, judgement.reason
    assert reads is not None


def test_an_image_that_cannot_be_written_is_unknown(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    judgement, _ = run('test -e "$image"')
    assert judgement.verdict is Verdict.UNKNOWN


WITH_A_TABLE = bytes(446) + b"\0\0\0\0\x83\0\0\0\1\0\0\0\7\0\0\0" + bytes(48) + b"\x55\xaa"
BLANK = "the disk reads all zeroes"
UNKNOWN = "no filesystem|there is no partition|superblock"


@pytest.mark.parametrize(
    ("base", "written", "command", "told"),
    [
        (b"", False, 'test -d "$dir"', (Verdict.FAIL, BLANK)),
        (b"", False, 'test -e "$fs"', (Verdict.FAIL, BLANK)),
        (b"", False, 'test "$part"', (Verdict.FAIL, BLANK)),
        (b"", True, 'test -d "$dir"', (Verdict.UNKNOWN, UNKNOWN)),
        (b"", True, 'test -e "$fs"', (Verdict.UNKNOWN, UNKNOWN)),
        (WITH_A_TABLE, False, 'test -d "$dir"', (Verdict.FAIL, "partition 1 .*reads all zeroes")),
        (WITH_A_TABLE, False, 'test -e "$fs"', (Verdict.PASS, "")),
        (WITH_A_TABLE, True, 'test -d "$dir"', (Verdict.UNKNOWN, UNKNOWN)),
    ],
)
def test_a_state_that_has_lost_its_filesystem_fails_if_that_is_certain(
    base: bytes, written: bool, command: str, told: tuple[Verdict, str], tmp_path: Path
) -> None:
    """A command that finds no fault in an empty folder would pass what is lost altogether."""
    log: list[Received | Completed] = [Received(Command.WRITE, SIZE // SECTOR - 1, 1), Completed(0)]
    source = MemorySource(
        table_of(log), SIZE, 2, lambda: MemoryDisk(base.ljust(SIZE, b"\0")), b"\1" * SECTOR, []
    )
    ran, state = tmp_path / "ran", "s2.received.all" if written else "s0.received.all"
    plan = CommandPlan(f"touch {ran}; {command}", 30, 1, Tree((Mount(partition=1),)))
    with closing(Timeline(source)) as timeline, closing(plan.open(timeline)) as judge:
        found, reads = judge.judge(parse_state_id(state), None)
    assert found.verdict is told[0]
    assert re.search(told[1], found.reason or "")
    assert ran.exists() is (found.verdict is Verdict.PASS)
    assert reads is None


@pytest.mark.parametrize("ends", ["exit 0", "exit 1", "sleep 1000", "kill -9 $$"])
def test_children_end_with_the_command(run: Run, tmp_path: Path, ends: str) -> None:
    out = tmp_path / "pid"
    command = f"sleep 1000 & echo $! > {out}; (sleep 1001; :) & nbdinfo $uri; {ends}"
    began = time.monotonic()
    judgement, _ = run(command, time_limit_s=1.5)
    assert time.monotonic() - began < 20
    pid = int(out.read_text())
    until(lambda: not alive(pid), "the child has ended")
    wanted = {"exit 0": Verdict.PASS, "exit 1": Verdict.FAIL}.get(ends, Verdict.UNKNOWN)
    assert judgement.verdict is wanted
    if ends.startswith("sleep"):
        assert judgement.reason == "it took longer than 1.5 s"


def test_one_judge_judges_many_states_and_leaves_nothing(
    timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    judge = CommandPlan('nbdcopy "$uri" - | cmp - "$image"', 30).open(timeline)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in [*DISKS, *DISKS]:
        if name.startswith("s") and "." in name:
            judgement, _ = judge.judge(parse_state_id(name), None)
            assert judgement.verdict is Verdict.PASS, (name, judgement.reason)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    judge.close()
    assert list(scratch.iterdir()) == []

"""The law of a working image: whatever was done to it, it equals the next disk, byte for byte."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.evaluator import EvaluatorSetup, StateEvaluator, Unit
from nbdproxy.crash.explore.stages import Stage, Stages
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.holes import data_extents
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.working import BLOCK, WorkingImage
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Verdict
from nbdproxy.persistence.model import Level, Options
from tests.support.exploring import random_case

BLOCKS = 40
SIZE = BLOCKS * BLOCK - 700
ROUNDS = 150


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for scratch files, in which nothing may be left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def note_seed(seed: int) -> None:
    """Have it shown if the test fails."""
    sys.stderr.write(f"seed {seed}\n")


def write(path: Path, dice: random.Random) -> None:
    with path.open("r+b") as file:
        for _ in range(dice.randint(1, 4)):
            file.seek(dice.randrange(SIZE))
            file.write(dice.choice([b"\0" * BLOCK, b"scribble" * 3000, dice.randbytes(600)]))


def write_and_say_nothing(path: Path, dice: random.Random) -> None:
    before = path.stat()
    write(path, dice)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_through_a_map(path: Path, dice: random.Random) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        at = dice.randrange(SIZE)
        assert mapped[at] < 256
        mapped[at] ^= 1


def cut_off(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randrange(SIZE))


def cut_off_and_grow(path: Path, dice: random.Random) -> None:
    cut_off(path, dice)
    os.truncate(path, SIZE + dice.randrange(3) * BLOCK)


def append(path: Path, dice: random.Random) -> None:
    with path.open("ab") as file:
        file.write(dice.randbytes(dice.randrange(2 * BLOCK)))


def fill(path: Path, dice: random.Random) -> None:
    with path.open("r+b") as file:
        file.write(bytes(SIZE) if dice.randrange(2) else b"\1" * SIZE)


def replace(path: Path, dice: random.Random) -> None:
    other = path.with_name("other")
    other.write_bytes(dice.randbytes(SIZE))
    other.rename(path)


def remove(path: Path, dice: random.Random) -> None:
    path.unlink()
    if dice.randrange(2):
        path.mkdir()
        (path / "in the way").write_text("x")


def rename_and_link_back(path: Path, _: random.Random) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def keep_a_second_name(path: Path, dice: random.Random) -> None:
    os.link(path, path.with_name("second"))
    write(path, dice)


def close_it_to_others(path: Path, dice: random.Random) -> None:
    write(path, dice)
    path.chmod(dice.choice([0o000, 0o400, 0o777]))
    (path.parent / "litter").mkdir()
    (path.parent / "litter" / "more").write_text("x")


def nothing(_path: Path, _: random.Random) -> None:
    """Only look."""


MISCHIEF: list[Callable[[Path, random.Random], None]] = [
    *(write, write_and_say_nothing, write_through_a_map, cut_off, cut_off_and_grow, append, fill),
    *(replace, remove, rename_and_link_back, keep_a_second_name, close_it_to_others, nothing),
]


def changed(content: bytearray, dice: random.Random) -> list[Extent]:
    """Change a disk in some places, to zeroes now and then; return where."""
    found = []
    for _ in range(dice.randrange(5)):
        offset = dice.randrange(SIZE)
        length = min(dice.choice([1, 512, 5000, 2 * BLOCK]), SIZE - offset)
        content[offset : offset + length] = (
            bytes(length) if dice.randrange(2) else dice.randbytes(length)
        )
        found.append(Extent(offset, length))
    return found


def assert_is(path: Path, content: bytes) -> None:
    assert path.read_bytes() == content
    with path.open("rb") as file:
        there = list(data_extents(file.fileno(), 0, SIZE))
    for block in range(BLOCKS):
        start, end = block * BLOCK, min((block + 1) * BLOCK, SIZE)
        is_data = any(extent.offset < end and extent.end > start for extent in there)
        assert is_data == any(content[start:end]), f"block {block}"


def test_it_equals_the_disk_whatever_was_done_to_it() -> None:
    seed = random.randrange(10**6)
    note_seed(seed)
    dice = random.Random(seed)
    content = bytearray(SIZE)
    with closing(WorkingImage()) as image:
        for _ in range(ROUNDS):
            where = changed(content, dice)
            image.bring(MemoryDisk(bytes(content)), dice.choice([where, where, None]))
            with image.lent() as path:
                assert [one.name for one in path.parent.iterdir()] == [path.name]
                assert_is(path, bytes(content))
                if dice.randrange(3):
                    dice.choice(MISCHIEF)(path, dice)


STRAY = """
import mmap, os, sys
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 0)
if sys.argv[2] == "mapped":
    file.close()
print("open", flush=True)
for line in sys.stdin:
    mapped[0] ^= 255
    if sys.argv[2] == "open":
        os.pwrite(file.fileno(), b"stray", 70000)
    print("written", flush=True)
"""


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_what_a_process_still_has_open_is_not_lent_again(how: str) -> None:
    content = bytes(index % 251 for index in range(SIZE))
    disk = MemoryDisk(content)
    with closing(WorkingImage()) as image:
        image.bring(disk, None)
        with image.lent() as path:
            stray = subprocess.Popen(
                [sys.executable, "-c", STRAY, path, how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            said = stray.stdout
            assert said is not None
            assert said.readline() == "open\n"
        try:
            image.bring(disk, [])
            with image.lent() as path:
                assert stray.stdin is not None
                stray.stdin.write("now\n")
                stray.stdin.flush()
                assert said.readline() == "written\n"
                assert path.read_bytes() == content
        finally:
            stray.kill()
            stray.communicate()


def test_a_check_that_scribbles_sees_each_state_as_it_is(tmp_path: Path) -> None:
    """In the order of an exploration, at several cuts, near both ends of each."""
    check = """
    nbdcopy "$uri" - | cmp - "$image" || exit 1
    test "$(ls "$(dirname "$image")")" = image || exit 1
    case $(( $(cksum <"$image" | cut -d" " -f1) % 5 )) in
    0) dd if=/dev/urandom of="$image" bs=700 count=9 seek=7 conv=notrunc status=none;;
    1) truncate -s 1000 "$image";;
    2) echo gone >"$image.new"; mv "$image.new" "$image";;
    3) : >"$image"; echo litter >"$image.litter";;
    esac
    """
    case = random_case(tmp_path, seed := random.randrange(10**6), check)
    note_seed(seed)
    with RecordedSource(case.run) as source, closing(Timeline(source)) as timeline:
        fields = CrashSpaceBuilder(timeline, Level.FLUSHED, Options())
        cuts = [source.events // 2, source.events - 9, source.events]
        units = []
        for cut in cuts:
            stages = Stages(fields.at(cut), seed=seed)
            visits = [*stages.visits(Stage.ENDS), *islice(stages.visits(Stage.REQUESTS), 4)]
            states = [str(visit.state) for visit in visits]
            units.append(Unit(cut, tuple(states)))
    with RecordedSource(case.run) as source:
        evaluator = StateEvaluator(
            source, EvaluatorSetup(case.run, None, Level.FLUSHED, Options(), case.judge, False)
        )
        with closing(evaluator):
            found = [one for unit in units for one in evaluator.judge(unit)]
    assert len(found) > 12
    assert {one.judgement.verdict for one in found} == {Verdict.PASS}


def test_a_disk_that_is_full_is_said() -> None:
    """What a limit on the size of files gives is the same error in all but its number."""
    code = """
import resource, signal, sys
from nbdproxy.crash.states.naming import parse_state_id
from nbdproxy.state_server.commands import CommandPlan
from tests.server.test_states import make_timeline
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
judge = CommandPlan('true "$image"', 9).open(make_timeline())
judgement, reads = judge.judge(parse_state_id("s9.flushed.all"), None)
judge.close()
print(judgement.verdict, judgement.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unknown the state could not be written to a file: File too")
    assert "TMPDIR" in done.stdout

"""What a state lacks of a file, on filesystems that only a kernel reads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.crash.blame.block_owners import RecordingOwners
from nbdproxy.crash.blame.file_history import carrying_requests, histories
from nbdproxy.crash.blame.ranges import Losses, LossFinder
from nbdproxy.crash.blame.replay import JudgedFiles
from nbdproxy.crash.states.naming import Choice, RequestPart, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.extract import extract
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import ONLY, Tree
from nbdproxy.persistence.model import Level
from nbdproxy.state_server.commands import CommandPlan

pytestmark = pytest.mark.lab

NBDPROXY = f"{sys.executable} -m nbdproxy"
LENGTH = 70_000
CONTENT = "".join(f"line {number:>10}\n" for number in range(LENGTH // 16)).encode()
SCRIPT = """mkdir d; sync
i=0; while [ $i -lt 4375 ]; do printf "line %10d\\n" $i; i=$((i+1)); done > d/b; sync
head -c 300 d/b > d/small; sync"""


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def timeline(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Timeline]:
    """A guest that writes a file of some blocks and a small one, and syncs after each."""
    folder, fs = tmp_path_factory.mktemp(request.param), request.param
    (folder / "script").write_text(SCRIPT)
    guest = f'{NBDPROXY} lab run - "$uri" --fs {fs} --script "$(cat script)" --qmp qmp'
    for command in (
        f"{NBDPROXY} lab format image --size 320M --fs {fs}",
        f"{NBDPROXY} serve image --record run --qmp qmp --run '{guest}'",
    ):
        subprocess.run(["sh", "-c", command], cwd=folder, check=True, timeout=240)
    with RecordedSource(folder / "run") as source, closing(Timeline(source)) as made:
        yield made


def entry(name: str, content: bytes) -> Entry:
    return Entry(f"/d/{name}", hashlib.sha256(content).hexdigest(), len(content))


def restored(state: StateId, found: Losses, *, but: int | None = None) -> StateId:
    """The state with what was lost put back."""
    seqs = {one.data.seq for one in found.ranges if one.data} | {one.seq for one in found.way}
    parts = tuple(RequestPart(seq) for seq in sorted(seqs - {but}))
    return StateId(state.position, state.level, Choice.ONLY, state.options, parts)


def test_just_what_is_lacking_makes_the_file_whole(
    timeline: Timeline, kernel: KernelOracle
) -> None:
    """And of what is no data nothing that is named is needless."""
    files = (entry("b", CONTENT), entry("small", CONTENT[:300]))
    finder = LossFinder(RecordingOwners(timeline, Tree(), kernel), Manifest(files))
    told = set()
    for file in files:
        wanted = Manifest((file,))
        follower = kernel.prepare_check(wanted, earlier={}, mount=ONLY)
        [history] = histories(JudgedFiles(timeline, wanted, Tree(), kernel))
        flushed, sent = (history.levels[level] for level in (Level.FLUSHED, Level.RECEIVED))
        assert sent.since is not None and flushed.since is not None
        assert flushed.since > sent.since
        unflushed = StateId(flushed.since - 1, Level.FLUSHED, Choice.MUST)
        for state in (unflushed, StateId(timeline.source.events, Level.NOTHING, Choice.MUST)):
            assert follower.check(timeline.open(state), None).verdict is Verdict.FAIL
            found = finder.losses(file, state)
            assert found is not None
            whole = timeline.open(restored(state, found))
            assert follower.check(whole, None).verdict is Verdict.PASS, str(state)
            for piece in found.way:
                less = timeline.open(restored(state, found, but=piece.seq))
                assert follower.check(less, None).verdict is not Verdict.PASS, str(state)
            starts, ends = [one.start for one in found.ranges], [one.end for one in found.ranges]
            assert [*starts, file.size] == [0, *ends]
            for one in found.ranges:
                told.add((file.path, "data" if one.data else "apart" if one.is_apart else "in"))
    assert ("/d/b", "data") in told
    assert ("/d/small", "in") in told or ("/d/small", "data") in told


def test_what_carried_the_data(timeline: Timeline, kernel: KernelOracle) -> None:
    """Every byte of the file, and what the requests hold there is the file's."""
    covered = 0
    owners = RecordingOwners(timeline, Tree(), kernel)
    for request in carrying_requests(owners, entry("b", CONTENT)):
        for owner in request.owners:
            disk = timeline.at(timeline.source.events)
            data = disk.pread(owner.extent.offset, owner.extent.length)
            start = owner.offset or 0
            assert data.startswith(CONTENT[start : start + owner.extent.length])
            covered += min(owner.extent.length, LENGTH - start)
    assert covered == LENGTH


def test_a_state_that_is_the_same_where_it_was_read_is_not_mounted_again(
    timeline: Timeline, kernel: KernelOracle
) -> None:
    wanted = Manifest((entry("b", CONTENT),))
    follower = kernel.prepare_check(wanted, earlier={}, mount=ONLY)
    disk = timeline.at(timeline.source.events)
    first = follower.check(disk, None)
    assert first.verdict is Verdict.PASS
    assert follower.check(disk, []) is first
    reads = list(follower.reads or ())
    assert 0 < sum(extent.length for extent in reads) < disk.size // 4
    again = follower.check(disk, reads[-1:])
    assert again == first and again is not first


def test_files_are_had_out_of_a_state(
    timeline: Timeline, kernel: KernelOracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By extract, and by a check that asks for them; in a state, and in one that has less."""
    out = tmp_path / "out"
    out.mkdir()
    end = timeline.at(timeline.source.events)
    found = extract(kernel, end, Tree(), ["/d", "/d/gone"], out)
    assert (out / "d" / "b").read_bytes() == CONTENT
    assert (out / "d" / "small").read_bytes() == CONTENT[:300]
    assert found.lost == [("/d/gone", "it is not there")]
    assert (found.doubtful, found.skipped, found.refused) == ([], [], None)
    with kernel.browse(end, mount=ONLY) as view:
        assert view.find(b"/") is not None
        file = view.find(b"/d/b")
        assert file is not None
        assert (out / "d" / "b").stat().st_mtime_ns == file.mtime_ns
    monkeypatch.setattr(kernel, "close", lambda: None)
    check = 'cmp -s -n 300 "$dir/d/b" "$dir/d/small"'
    judge = CommandPlan(check, 60, oracle=lambda: kernel).open(timeline)
    seq = next(seq for seq in timeline.table.seq.tolist() if seq > timeline.source.events // 2)
    states = [StateId(cut, Level.RECEIVED, Choice.ALL) for cut in (timeline.source.events, seq)]
    with closing(judge):
        (whole, reads), (less, _) = (judge.judge(state, None) for state in states)
    assert whole.verdict is Verdict.PASS, whole.reason
    assert reads is not None
    assert list(reads)
    assert less.verdict is not Verdict.PASS

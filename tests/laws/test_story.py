"""File histories against a look at every instant: each disk is checked anew, from the start."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import pytest

from nbdproxy.crash.blame.block_owners import RecordingOwners
from nbdproxy.crash.blame.file_history import LEVELS, carrying_requests, histories
from nbdproxy.crash.blame.replay import JudgedFiles
from nbdproxy.crash.explore.judging import ManifestPlan
from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.oracles import check as oracle
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.owners import OwnerKind
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.persistence.model import Options
from nbdproxy.report.histories import overview
from tests.support import ext4
from tests.support.exploring import ext4_case
from tests.support.forked import ForkedServer
from tests.support.nbd_client import WRITE, Op

Opened = tuple[Timeline, Manifest]


FAILING = """
summary = "Every third write fails"
imitates = "A bad cable"
sources = ["made up"]
[[rule]]
name = "fails"
action = "error"
command = "write"
every = 3
errno = "EIO"
[[example]]
do = ["write 0 A", "flush", "exit"]
image = ["A", "-", "-", "-"]
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """The same where writes fail: sent again until they do not, with others between."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.toml").write_text(FAILING)
    images = ext4.stages(folder)
    (folder / "image").write_bytes(images[0])
    options = ("--record", folder / "run", "--policy", folder / "failing.toml")
    with ForkedServer(folder, folder / "image", *options) as server:
        client = server.client()
        for before, after in pairwise(images):
            left = [
                Op(WRITE, at, data=after[at : at + ext4.BLOCK])
                for at in range(0, ext4.SIZE, ext4.BLOCK)
                if before[at : at + ext4.BLOCK] != after[at : at + ext4.BLOCK]
            ]
            while left:
                replies = client.do(*left)
                left = [op for op, reply in zip(left, replies, strict=True) if reply.error]
            client.flush()
        client.disc()
        server.signal(signal.SIGTERM)
        server.wait()
    names = (ext4.FLUSHED, ext4.UNFLUSHED)
    entries = [
        Entry(f"/{n}", hashlib.sha256(ext4.content(n)).hexdigest(), len(ext4.content(n)))
        for n in names
    ]
    with RecordedSource(folder / "run") as source, closing(Timeline(source)) as timeline:
        assert (timeline.table.error != 0).sum() > 3
        yield timeline, Manifest(tuple(entries))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """A recording of two files, one flushed, and what they should be."""
    case = ext4_case(tmp_path_factory.mktemp("ext4"))
    assert isinstance(case.judge, ManifestPlan)
    with RecordedSource(case.run) as source, closing(Timeline(source)) as timeline:
        yield timeline, case.judge.manifest


@pytest.mark.parametrize("case", ["opened", "failing"])
def test_the_condition_at_every_instant_is_what_a_look_there_finds(
    request: pytest.FixtureRequest, case: str
) -> None:
    timeline, manifest = request.getfixturevalue(case)
    told = histories(JudgedFiles(timeline, manifest, Tree()))
    seen = set()
    for level in LEVELS:
        for position in range(timeline.source.events + 1):
            disk = timeline.open(StateId(position, level, Choice.MUST, Options()))
            found = oracle.check(disk, manifest, earlier={}).conditions
            for history in told:
                path = history.entry.path
                expected = found.get(path, Condition.CANNOT_BE_TOLD)
                assert history.levels[level].at(position) is expected, (level, position, path)
                seen.add(expected)
    assert len(seen) > 2
    for history in told:
        sent, answered, flushed = (history.levels[level].since for level in LEVELS)
        assert sent is not None
        assert answered is not None
        assert sent <= answered <= (timeline.source.events if flushed is None else flushed)
    flushed_in_the_end = [history.levels[LEVELS[-1]].since is not None for history in told]
    assert flushed_in_the_end == [True, case == "failing"]


def test_the_overview_counts_what_the_histories_tell(opened: Opened) -> None:
    timeline, manifest = opened
    told = histories(JudgedFiles(timeline, manifest, Tree()))
    rows = overview(told)
    assert rows[0][0] == 0
    for position, counts in rows:
        for level in LEVELS:
            whole = [s.levels[level].at(position) is Condition.WHOLE for s in told]
            assert counts[level] == sum(whole)
    assert list(rows[-1][1].values()) == [2, 2, 1]


def test_a_file_needs_the_requests_that_show_in_it(opened: Opened) -> None:
    """Without any one of them it is not whole, or its content is the same without it."""
    timeline, manifest = opened
    owners = RecordingOwners(timeline, Tree())
    end = timeline.source.events
    for entry in manifest.entries:
        found = carrying_requests(owners, entry)
        kinds = {owner.kind for request in found for owner in request.owners}
        assert {OwnerKind.FILE_DATA, OwnerKind.INODE_TABLE} <= kinds
        data = [
            request
            for request in found
            if any(o.kind is OwnerKind.FILE_DATA and entry.path in o.paths for o in request.owners)
        ]
        assert data
        own = Manifest((entry,))
        for request in data:
            lacking = f"s{end}.nothing.but{request.seq}"
            disk = timeline.open(parse_state_id(lacking))
            conditions = oracle.check(disk, own, earlier={}).conditions
            assert conditions[entry.path] is not Condition.WHOLE

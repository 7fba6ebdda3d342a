"""The table cache mode x failure, on disks so small that a file is a sector.

See `tests.support.sector_files`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest

from nbdproxy.crash.blame.causes import Cause
from nbdproxy.crash.blame.replay import Cell, JudgedFiles, Replay, ReplayOptions
from nbdproxy.crash.blame.replay import replay as judge
from nbdproxy.crash.blame.together import Together
from nbdproxy.crash.states.naming import StateId
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import ProjectionError, UsageError
from nbdproxy.oracles.check import Findings, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.persistence.model import Coverage, Options
from nbdproxy.persistence.modes import THROUGH, CacheMode, Failure
from nbdproxy.recording.notes import NoteKind
from nbdproxy.report.replayed import to_json
from nbdproxy.requests import Command
from tests.support.memory_source import MemorySource
from tests.support.persistence_reference import Completed, Received
from tests.support.sector_files import FORMATTED, MAGIC, PATHS, TREE, SectorFiles

MakeSource = Callable[..., MemorySource]
Log = list[Received | Completed]


def wrote(source: MemorySource) -> Manifest:
    """The manifest of everything that the recording's writes were to leave, one file a write."""
    table = source.table
    return Manifest(
        tuple(
            Entry(PATHS[offset // 512], str(seq + 1), 512)
            for seq, offset, at in zip(
                table.seq.tolist(), table.offset.tolist(), table.position.tolist(), strict=True
            )
            if at >= 0
        )
    )


def replay(
    source: MemorySource,
    manifest: Manifest,
    *,
    oracle: Oracle,
    progress: Callable[[StateId], None] = lambda _: None,
    **options: Any,
) -> Replay:
    """The table of a recording whose files are where `sector_files` has them."""
    files = JudgedFiles(Timeline(source), manifest, TREE, oracle, progress)
    return judge(files, ReplayOptions(**options))


def cell(result: Replay, mode: CacheMode, failure: Failure) -> Cell:
    (found,) = [c for c in result.cells if (c.mode, c.failure) == (mode, failure)]
    return found


def causes(found: Cell) -> dict[str, str]:
    return {p: o.cause.value for p, o in found.worst.files.items() if o.cause is not None}


def write(first: int) -> Received:
    return Received(Command.WRITE, first, 1)


FLUSH = Received(Command.FLUSH)
EVERY_FATE: Log = [
    *(write(0), Completed(0)),
    *(FLUSH, Completed(2)),
    *(write(1), Completed(4)),
    FLUSH,
    *(write(2), Completed(7)),
    write(3),
]
NEVER_SENT = Entry("/e", "99", 512)


def every_fate(make_source: MakeSource) -> tuple[MemorySource, Manifest]:
    source = make_source(EVERY_FATE, base=FORMATTED)
    return source, Manifest((*wrote(source).entries, NEVER_SENT))


@pytest.mark.parametrize(
    ("mode", "failure", "expected"),
    [
        ("none", "storage-loss", "a=flushed-then-lost b=flush-in-flight c=unflushed"),
        ("unsafe", "host-power-loss", "a=flushed-then-lost b=flush-in-flight c=unflushed"),
        ("none", "host-power-loss", "b=flush-in-flight c=unflushed"),
        ("writeback", "host-power-loss", "b=flush-in-flight c=unflushed"),
        ("writethrough", "host-power-loss", ""),
        ("directsync", "host-power-loss", ""),
        ("unsafe", "qemu-kill", ""),
        (
            "writethrough",
            "storage-loss",
            "a=flushed-then-lost b=flushed-then-lost c=flushed-then-lost",
        ),
    ],
)
def test_the_cause_is_the_first_thing_not_kept(
    make_source: MakeSource, mode: str, failure: str, expected: str
) -> None:
    source, manifest = every_fate(make_source)
    result = replay(source, manifest, oracle=SectorFiles())
    found = causes(cell(result, CacheMode(mode), Failure(failure)))
    always = {"/d": "sent-unanswered", "/e": "never-sent"}
    assert found == always | {f"/{word[0]}": word[2:] for word in expected.split()}


@pytest.mark.parametrize("failure", [Failure.GUEST_RESET, Failure.GUEST_POWEROFF])
def test_what_qemu_was_given_is_drained(make_source: MakeSource, failure: Failure) -> None:
    source, manifest = every_fate(make_source)
    result = replay(source, manifest, oracle=SectorFiles())
    assert causes(cell(result, CacheMode.UNSAFE, failure)) == {"/e": "never-sent"}


def test_worst_and_best_are_counted_apart(make_source: MakeSource) -> None:
    source, manifest = every_fate(make_source)
    found = cell(
        replay(source, manifest, oracle=SectorFiles()),
        CacheMode.NONE,
        Failure.HOST_POWER_LOSS,
    )
    assert found.verdict is Verdict.FAIL
    assert found.worst.conditions == Counter({Condition.MISSING: 4, Condition.WHOLE: 1})
    assert found.best.conditions == Counter({Condition.WHOLE: 4, Condition.MISSING: 1})
    assert found.best.causes == Counter({Cause.NEVER_SENT: 1})


def test_equal_states_are_judged_once(make_source: MakeSource) -> None:
    source, manifest = every_fate(make_source)
    oracle = SectorFiles()
    heard: list[StateId] = []
    result = replay(source, manifest, oracle=oracle, progress=heard.append)
    assert len(result.cells) == 25
    # Nothing, flushed, flushing, completed, received; all that was sent is the last again.
    assert oracle.checks == len(heard) == 5


def test_a_file_that_was_there_before_is_stale(make_source: MakeSource) -> None:
    base = bytes([7]) * 512 + FORMATTED[512:]
    source = make_source([write(0)], base=base)
    result = replay(source, wrote(source), oracle=SectorFiles())
    found = cell(result, CacheMode.NONE, Failure.HOST_POWER_LOSS)
    assert found.worst.conditions == {Condition.STALE: 1}


def test_a_disk_still_blank_misses_every_file(make_source: MakeSource) -> None:
    log: Log = [write(0), Completed(0), write(1), Completed(2)]
    log += [Received(Command.WRITE, 7, 1), Completed(4)]
    made = make_source(log, base=bytes(4096))
    payload = made.payload[:1024] + bytes([MAGIC]) * 512
    source = MemorySource(made.table, 4096, len(log), made.open_base, payload)
    manifest = Manifest((Entry("/a", "1", 512), Entry("/b", "3", 512)))
    result = replay(source, manifest, oracle=SectorFiles())
    found = cell(result, CacheMode.NONE, Failure.HOST_POWER_LOSS)
    assert found.verdict is Verdict.FAIL
    assert found.worst.conditions == {Condition.MISSING: 2}
    assert found.worst.causes == {Cause.UNFLUSHED: 2}
    assert found.worst.reason == "the disk reads all zeroes"
    assert cell(result, CacheMode.NONE, Failure.QEMU_KILL).verdict is Verdict.PASS


def test_a_state_that_cannot_be_judged_is_unknown_and_never_passes(
    make_source: MakeSource,
) -> None:
    """The superblock is replaced, and the new one is never flushed."""
    base = FORMATTED[:3584] + bytes([3]) * 512
    made = make_source([write(0), Received(Command.WRITE, 7, 1)], base=base)
    payload = bytes([1]) * 512 + bytes([MAGIC]) * 512
    source = MemorySource(made.table, 4096, 2, made.open_base, payload)
    result = replay(source, Manifest((Entry("/a", "1", 512),)), oracle=SectorFiles())
    found = cell(result, CacheMode.NONE, Failure.HOST_POWER_LOSS)
    assert (found.verdict, found.worst.verdict) == (Verdict.UNKNOWN, Verdict.UNKNOWN)
    assert found.worst.reason == "no filesystem found"
    assert not found.worst.files
    assert found.best.verdict is Verdict.PASS


def test_a_loss_in_the_fullest_state_fails_the_cell(make_source: MakeSource) -> None:
    """The guest wrote over the file later: the power loss may keep that or not."""
    log: Log = [write(0), Completed(0), FLUSH, Completed(2), write(0), Completed(4)]
    source = make_source(log, base=FORMATTED)
    result = replay(source, Manifest((Entry("/a", "1", 512),)), oracle=SectorFiles())
    found = cell(result, CacheMode.NONE, Failure.HOST_POWER_LOSS)
    assert (found.worst.verdict, found.best.verdict) == (Verdict.PASS, Verdict.FAIL)
    assert found.verdict is Verdict.FAIL


def test_what_a_state_keeps_is_not_the_cause(make_source: MakeSource) -> None:
    """Flushed once and then changed by the guest: no store is accused of losing it."""
    log: Log = [write(0), Completed(0), FLUSH, Completed(2), write(0), Completed(4), write(0)]
    source = make_source(log, base=FORMATTED)
    result = replay(source, Manifest((Entry("/a", "1", 512),)), oracle=SectorFiles())
    killed = cell(result, CacheMode.NONE, Failure.QEMU_KILL)
    assert killed.worst.causes == killed.best.causes == {Cause.CHANGED_BY_GUEST: 1}


def test_a_file_that_was_never_whole_at_a_flush_was_never_sent(make_source: MakeSource) -> None:
    log: Log = [write(0), Completed(0), write(0), Completed(2), FLUSH, Completed(4)]
    source = make_source(log, base=FORMATTED)
    result = replay(source, Manifest((Entry("/a", "9", 512),)), oracle=SectorFiles())
    assert causes(cell(result, CacheMode.NONE, Failure.QEMU_KILL)) == {"/a": "never-sent"}


@pytest.mark.parametrize("after", range(1, 40))
def test_a_file_that_was_whole_at_any_one_of_many_flushes_was_changed_by_the_guest(
    make_source: MakeSource, after: int
) -> None:
    log: Log = []
    for _ in range(40):
        seq = len(log)
        log += [write(0), Completed(seq), FLUSH, Completed(seq + 2)]
    source = make_source(log, base=FORMATTED)
    expected = Manifest((Entry("/a", str(4 * (after - 1) + 1), 512),))
    result = replay(source, expected, oracle=SectorFiles())
    found = cell(result, CacheMode.NONE, Failure.QEMU_KILL)
    assert causes(found) == {"/a": "changed-by-guest"}


def test_what_was_whole_before_the_recording_was_changed_by_the_guest(
    make_source: MakeSource,
) -> None:
    source = make_source([write(0), Completed(0)], base=bytes([7]) * 512 + FORMATTED[512:])
    result = replay(source, Manifest((Entry("/a", "7", 512),)), oracle=SectorFiles())
    found = causes(cell(result, CacheMode.NONE, Failure.QEMU_KILL))
    assert found == {"/a": "changed-by-guest"}


def test_no_layer_that_the_fullest_state_has_is_the_cause(make_source: MakeSource) -> None:
    log: Log = [write(0), Completed(0), write(0)]
    source = make_source(log, base=FORMATTED)
    result = replay(source, Manifest((Entry("/a", "1", 512),)), oracle=SectorFiles())
    found = cell(result, CacheMode.NONE, Failure.HOST_POWER_LOSS)
    assert found.worst.causes == {Cause.UNFLUSHED: 1}
    assert found.best.causes == {Cause.NEVER_SENT: 1}


class Doubtful(SectorFiles):
    """Cannot read `/a`, wherever it is."""

    def judge(
        self, device: ReadableDevice, manifest: Manifest, earlier: Mapping[str, Collection[str]]
    ) -> Findings:
        found = super().judge(device, manifest, earlier)
        conditions = {**found.conditions, "/a": Condition.CANNOT_BE_TOLD}
        return Findings(Verdict.UNKNOWN, conditions, "/a: too new")


def test_nobody_is_blamed_for_what_the_oracle_cannot_read(make_source: MakeSource) -> None:
    source, manifest = every_fate(make_source)
    result = replay(source, manifest, oracle=Doubtful())
    found = cell(result, CacheMode.NONE, Failure.QEMU_KILL)
    assert found.verdict is Verdict.UNKNOWN
    assert found.worst.conditions[Condition.CANNOT_BE_TOLD] == 1
    assert causes(found) == {"/d": "sent-unanswered", "/e": "never-sent"}


class EarlierUnknown(SectorFiles):
    """Cannot judge a disk on which `/a` is as the first write left it."""

    def judge(
        self, device: ReadableDevice, manifest: Manifest, earlier: Mapping[str, Collection[str]]
    ) -> Findings:
        if device.pread(0, 1) == bytes([1]):
            return Findings(Verdict.UNKNOWN, {}, "too new")
        return super().judge(device, manifest, earlier)


def test_nobody_is_blamed_where_an_earlier_flush_left_what_cannot_be_judged(
    make_source: MakeSource,
) -> None:
    log: Log = [write(0), Completed(0), FLUSH, Completed(2), write(0), Completed(4)]
    source = make_source(log, base=FORMATTED)
    result = replay(source, Manifest((Entry("/a", "1", 512),)), oracle=EarlierUnknown())
    assert causes(cell(result, CacheMode.NONE, Failure.QEMU_KILL)) == {"/a": "cannot-be-told"}


class LaterUnknown(SectorFiles):
    """Cannot judge a disk once `/b` is on it, or `/b` alone."""

    def __init__(self, *, wholly: bool) -> None:
        self.wholly = wholly

    def judge(
        self, device: ReadableDevice, manifest: Manifest, earlier: Mapping[str, Collection[str]]
    ) -> Findings:
        found = super().judge(device, manifest, earlier)
        if found.conditions["/b"] is Condition.MISSING:
            return found
        conditions = {} if self.wholly else {**found.conditions, "/b": Condition.CANNOT_BE_TOLD}
        return Findings(Verdict.UNKNOWN, conditions, "too new")


@pytest.mark.parametrize(
    ("wholly", "expected"),
    [
        (True, {"/b": "cannot-be-told", "/c": "cannot-be-told", "/d": "cannot-be-told"}),
        (False, {"/b": "cannot-be-told", "/c": "unflushed", "/d": "sent-unanswered"}),
    ],
)
def test_nobody_is_blamed_while_what_keeps_more_is_unknown(
    make_source: MakeSource, wholly: bool, expected: dict[str, str]
) -> None:
    """Flushed is `/a` alone; what keeps `/b` as well cannot be judged."""
    source, manifest = every_fate(make_source)
    result = replay(source, manifest, oracle=LaterUnknown(wholly=wholly))
    never = "cannot-be-told" if wholly else "never-sent"
    found = causes(cell(result, CacheMode.NONE, Failure.HOST_POWER_LOSS))
    assert found == expected | {"/e": never}


def quit_in_order(make_source: MakeSource, *, error: int = 0) -> MemorySource:
    log: Log = [write(0), Completed(0), FLUSH, Completed(2), FLUSH, Completed(4, error)]
    notes = [(0, NoteKind.CONNECT, 1, ""), (6, NoteKind.DISC, 1, "")]
    return make_source(log, notes=notes, events=7, base=FORMATTED)


def test_each_failure_strikes_where_it_tells_most(make_source: MakeSource) -> None:
    source = quit_in_order(make_source)
    result = replay(source, wrote(source), oracle=SectorFiles())
    assert result.cut.text == "before-exit"
    for found in result.cells:
        at_end = found.failure is Failure.GUEST_POWEROFF
        assert (found.cut.text, found.cut.position) == (
            ("end", 7) if at_end else ("before-exit", 2)
        )
    assert causes(cell(result, CacheMode.NONE, Failure.HOST_POWER_LOSS)) == {"/a": "unflushed"}


def test_a_cut_that_is_asked_for_holds_for_all(make_source: MakeSource) -> None:
    source = quit_in_order(make_source)
    result = replay(source, wrote(source), at="seq:3", oracle=SectorFiles())
    assert {found.cut.position for found in result.cells} == {4}
    with pytest.raises(UsageError):
        replay(source, wrote(source), at="seq:7", oracle=SectorFiles())


def test_a_poweroff_with_a_failed_exit_flush_keeps_what_was_flushed_before(
    make_source: MakeSource,
) -> None:
    log: Log = [write(0), Completed(0), FLUSH, Completed(2, 5)]
    source = make_source(log, base=FORMATTED)
    result = replay(source, wrote(source), oracle=SectorFiles())
    assert causes(cell(result, CacheMode.NONE, Failure.GUEST_POWEROFF)) == {"/a": "unflushed"}


def test_only_what_was_asked_for_is_in_the_table(make_source: MakeSource) -> None:
    source, manifest = every_fate(make_source)
    result = replay(
        source,
        manifest,
        modes=[CacheMode.UNSAFE],
        failures=[Failure.QEMU_KILL],
        model=Options(Coverage.REPLIED),
        oracle=SectorFiles(),
    )
    assert [str(found.worst.state) for found in result.cells] == ["s10.completed.must+replied"]


def test_a_recording_without_flushes_leaves_three_modes_out(make_source: MakeSource) -> None:
    source = make_source([Received(Command.WRITE, 0, 1, fua=True), Completed(0)], base=FORMATTED)
    result = replay(source, wrote(source), oracle=SectorFiles())
    assert {found.mode for found in result.cells} == THROUGH
    assert result.recorded_under == set(CacheMode)
    assert "cannot be told" in result.why
    assert set(result.left_out) == set(CacheMode) - THROUGH
    assert cell(result, CacheMode.DIRECTSYNC, Failure.HOST_POWER_LOSS).verdict is Verdict.PASS
    with pytest.raises(ProjectionError):
        replay(source, wrote(source), modes=[CacheMode.NONE], oracle=SectorFiles())
    told = replay(source, wrote(source), recorded_as=CacheMode.NONE, oracle=SectorFiles())
    assert not told.left_out


def test_json_has_the_shape_of_the_command_line(make_source: MakeSource) -> None:
    source, manifest = every_fate(make_source)
    result = replay(source, manifest, oracle=SectorFiles())
    shown = json.loads(json.dumps(to_json(Together(result, (result,)), [source], ["run"])))
    assert (shown["recording"], shown["files"]) == ("run", 5)
    assert shown["cut"]["text"] == "before-exit"
    assert shown["cut"]["time_s"] == 0.009
    (found,) = [
        c for c in shown["cells"] if (c["mode"], c["failure"]) == ("none", "host-power-loss")
    ]
    assert found["verdict"] == "fail"
    assert found["worst"] == {
        "state": "s10.flushed.must",
        "verdict": "fail",
        "conditions": {"missing": 4, "whole": 1},
        "causes": {"flush-in-flight": 1, "unflushed": 1, "sent-unanswered": 1, "never-sent": 1},
    }
    assert found["best"]["conditions"] == {"whole": 4, "missing": 1}

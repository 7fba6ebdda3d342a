"""A proxy that is killed leaves a legal state, and a recording that opens and says what is missing.

`legal` is the model's rule 6 written out for one sector, slowly. It is asked twice: with the order
of events that the recording tells, and with the order that the clients themselves saw.

Not covered: the host losing power, for which a recording is not made.
"""

from __future__ import annotations

import random
import signal
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.persistence.model import Durability, Level
from nbdproxy.recording.index import NEVER, Mask, RequestTable
from nbdproxy.requests import Command
from tests.support import persistence_reference as reference
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy, until
from tests.support.workload import SECTOR, SECTORS, Load, is_base, make_image, stamp

POLICIES = ["drop-unflushed", "passthrough"]


def legal(table: RequestTable, must: Mask, numbers: Mapping[int, int], at: int) -> set[int]:
    """The stamps that sector `at` may have, but for the base's; -1 stands for that."""
    first, last = table.offset // SECTOR, (table.offset + table.length) // SECTOR
    rows = np.flatnonzero(table.is_modifying & (first <= at) & (at < last)).tolist()
    kept = [row for row in rows if must[row]]

    def overtaken(row: int) -> bool:
        return any(table.completed[row] < table.seq[later] for later in kept)

    values = {
        numbers[int(table.seq[row])] if table.command[row] == Command.WRITE else 0
        for row in rows
        if not overtaken(row)
    }
    return values if kept else values | {-1}


def illegal(
    image: bytes, before: bytes, table: RequestTable, must: Mask, numbers: Mapping[int, int]
) -> list[int]:
    """The sectors that hold what they may not."""
    wrong = []
    for at in range(SECTORS):
        place = slice(at * SECTOR, (at + 1) * SECTOR)
        found = stamp(image[place], at)
        allowed = legal(table, must, numbers, at)
        if -1 in allowed:
            allowed.add(stamp(before[place], at))
        assert not is_base(found) or image[place] == before[place]
        if found not in allowed:
            wrong.append(at)
    return wrong


def recorded_numbers(source: RecordedSource) -> dict[int, int]:
    """The stamp of each WRITE of a recording, by its seq."""
    numbers, buffer = {}, bytearray(8)
    for seq, position in zip(source.table.seq, source.table.position, strict=True):
        if position >= 0:
            source.read_payload(int(position), memoryview(buffer))
            (numbers[int(seq)],) = struct.unpack("<Q", buffer)
    return numbers


def kill(folder: Path, seed: int, policy: str, *, quiet: bool) -> Load:
    """Kill a server in the middle of a load, or when all of it is answered."""
    dice = random.Random(seed)
    make_image(folder / "image", dice)
    (folder / "before").write_bytes((folder / "image").read_bytes())
    options = ["--record", str(folder / "run"), "--policy", policy]
    with ForkedServer(folder, folder / "image", *options) as server:
        load = Load(server.client, seed, dice.randrange(1, 5))
        enough = dice.randrange(5, 900)
        until(lambda: load.sent >= enough, "enough was sent")
        if quiet:
            load.calm.set()
            load.join()
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        load.join()
    return load


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(12))
def test_a_kill_at_any_moment_leaves_a_legal_state(tmp_path: Path, seed: int, policy: str) -> None:
    load = kill(tmp_path, seed, policy, quiet=False)
    image, before = (tmp_path / "image").read_bytes(), (tmp_path / "before").read_bytes()
    source = RecordedSource(tmp_path / "run")
    assert source.missing is not None
    base = source.base()
    assert base.pread(0, base.size) == before, f"seed {seed}"
    base.close()
    level = Level.FLUSHED if policy == "drop-unflushed" else Level.COMPLETED
    numbers = recorded_numbers(source)
    must = Durability(source.table).kept(slice(None), source.events, level)
    assert not illegal(image, before, source.table, must, numbers), f"seed {seed}"
    seen = reference.table_of(load.log)
    must = Durability(seen).kept(slice(None), len(load.log), level)
    assert not illegal(image, before, seen, must, load.numbers), f"seed {seed}"
    source.close()


@pytest.mark.parametrize("seed", range(20, 26))
def test_a_killed_recorder_has_every_request_that_was_answered(tmp_path: Path, seed: int) -> None:
    load = kill(tmp_path, seed, "passthrough", quiet=False)
    source = RecordedSource(tmp_path / "run")
    source.verify()
    table, numbers = source.table, recorded_numbers(source)
    in_recording = {numbers[s] for s, c in zip(table.seq, table.completed, strict=True)
                    if int(s) in numbers and c != NEVER}  # fmt: skip
    seen = reference.table_of(load.log)
    answered = {load.numbers[s] for s in seen.seq[seen.completed != NEVER] if s in load.numbers}
    assert answered
    assert answered <= in_recording, f"seed {seed}"
    flushes = int(np.count_nonzero(seen.is_flush & (seen.completed != NEVER)))
    assert flushes <= int(np.count_nonzero(table.is_flush & (table.completed != NEVER)))
    source.close()


@pytest.mark.parametrize("seed", range(40, 48))
def test_a_kill_while_nothing_is_in_flight_leaves_exactly_the_survivors(
    tmp_path: Path, seed: int
) -> None:
    kill(tmp_path, seed, "drop-unflushed", quiet=True)
    source = RecordedSource(tmp_path / "run")
    disk = open_state(source, StateId(source.events, Level.FLUSHED, Choice.MUST))
    assert disk.pread(0, disk.size) == (tmp_path / "image").read_bytes(), f"seed {seed}"
    disk.close()
    source.close()


def test_the_commands_open_what_a_killed_recorder_left(tmp_path: Path) -> None:
    kill(tmp_path, 60, "drop-unflushed", quiet=False)
    run = tmp_path / "run"
    told = nbdproxy("info", run).stdout
    assert "did not end in order" in told
    assert nbdproxy("log", run, "--type", "write").stdout
    choice = ["--mode", "none", "--failure", "host-power-loss"]
    nbdproxy("open", run, "--at", "end", *choice, "-o", tmp_path / "state")
    assert (tmp_path / "state").stat().st_size == SECTORS * SECTOR

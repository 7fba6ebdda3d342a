"""THE LAW: the image after a live cut equals, byte for byte, the crash state the recording gives.

Random requests (writes, zeroes and trims with and without FUA, flushes; overlapping, pipelined, on
one to four connections; on an image with data and holes; in every other run they begin and end at
any byte, as the disk does) run against a real `nbdproxy serve` until
a signal ends it with requests in flight. Then, through the recording alone:

    drop-unflushed, SIGTERM    the image is the worst state of cache=none and host power loss
    unsafe, SIGTERM            the image is the worst state of cache=unsafe: as it was before
    passthrough, SIGTERM       the image is the state with all that was received
    --overlay                  the image is as it was before
    any of them                the base is the image as it was before

A failing run prints its seed. The seed does not fix the timing: repeat a seed a few times.
Not covered: SIGKILL (`test_killed_proxy.py`) and cuts at events (`test_cut_events.py`).
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.persistence.model import Level
from nbdproxy.recording.index import NEVER
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy, until
from tests.support.workload import SECTOR, Load, make_image, some_size


def run(folder: Path, seed: int, *options: str, ending: int = signal.SIGTERM) -> bytes:
    """Run a load on `image` until it is ended in the middle; return the image as it was before."""
    dice = random.Random(seed)
    make_image(folder / "image", dice, some_size(seed))
    before = (folder / "image").read_bytes()
    with ForkedServer(
        folder, folder / "image", "--record", str(folder / "run"), *options
    ) as server:
        load = Load(server.client, seed, dice.randrange(1, 5), size=some_size(seed))
        enough = dice.randrange(5, 900)
        until(lambda: load.sent >= enough, "enough was sent")
        server.signal(ending)
        code = server.wait()
        load.join()
        assert code == 0, server.log
    source = RecordedSource(folder / "run")
    base = source.base()
    assert base.pread(0, base.size) == before, f"the base of seed {seed}"
    base.close()
    source.close()
    return before


def differing(folder: Path, level: Level, choice: Choice) -> list[int]:
    """The sectors in which the image is not the state that the recording gives at its end."""
    image = (folder / "image").read_bytes()
    source = RecordedSource(folder / "run")
    assert source.missing is None
    disk = open_state(source, StateId(source.events, level, choice))
    state = disk.pread(0, disk.size)
    disk.close()
    source.close()
    assert len(image) == len(state)
    return [
        at // SECTOR
        for at in range(0, len(image), SECTOR)
        if image[at : at + SECTOR] != state[at : at + SECTOR]
    ]


@pytest.mark.parametrize("seed", range(60))
def test_a_dropped_cache_leaves_what_the_recording_says_must_survive(
    tmp_path: Path, seed: int
) -> None:
    run(tmp_path, seed, "--policy", "drop-unflushed")
    assert not differing(tmp_path, Level.FLUSHED, Choice.MUST), f"seed {seed}"


@pytest.mark.parametrize("seed", range(100, 112))
def test_passthrough_leaves_all_that_was_received(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed)
    assert not differing(tmp_path, Level.RECEIVED, Choice.MUST), f"seed {seed}"
    assert not differing(tmp_path, Level.RECEIVED, Choice.ALL), f"seed {seed}"


@pytest.mark.parametrize("seed", range(200, 206))
def test_unsafe_leaves_the_image_as_it_was(tmp_path: Path, seed: int) -> None:
    before = run(tmp_path, seed, "--policy", "unsafe")
    assert not differing(tmp_path, Level.NOTHING, Choice.MUST), f"seed {seed}"
    assert (tmp_path / "image").read_bytes() == before


@pytest.mark.parametrize("seed", range(300, 304))
@pytest.mark.parametrize("policy", ["passthrough", "drop-unflushed"])
def test_an_overlay_leaves_the_image_as_it_was(tmp_path: Path, seed: int, policy: str) -> None:
    before = run(tmp_path, seed, "--overlay", "--policy", policy)
    assert (tmp_path / "image").read_bytes() == before
    assert not differing(tmp_path, Level.NOTHING, Choice.MUST), f"seed {seed}"


@pytest.mark.parametrize("seed", range(400, 403))
def test_open_writes_the_image_of_the_live_cut(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, "--policy", "drop-unflushed")
    choice = ["--at", "end", "--mode", "none", "--failure", "host-power-loss"]
    nbdproxy("open", tmp_path / "run", *choice, "-o", tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == (tmp_path / "image").read_bytes(), f"seed {seed}"


def test_the_load_is_worth_its_name(tmp_path: Path) -> None:
    """Requests are in flight at the end, some are durable and some are not."""
    unanswered = durable = lost = 0
    for seed in range(500, 505):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run(folder, seed, "--policy", "drop-unflushed")
        source = RecordedSource(folder / "run")
        table = source.table
        disk = open_state(source, StateId(source.events, Level.FLUSHED, Choice.MUST))
        disk.close()
        unanswered += int((table.completed == NEVER).sum())
        durable += int((table.is_fua & (table.completed != NEVER)).sum())
        lost += len(differing(folder, Level.RECEIVED, Choice.ALL))
        source.close()
    assert unanswered
    assert durable
    assert lost

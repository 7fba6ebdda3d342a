"""The law of live cuts under policies: the image is the crash state that the recording gives.

Random requests on several connections, as in `test_cut_equality.py`, until a signal ends a server
under a policy with rules:

    errors, delays, drops, faults     the image is what must survive, byte for byte: faults are
                                      shown to clients and never reach the image
    fsyncgate                         the same, where a failed flush counts (rule 10)
    survives = "all"                  the image is all that was sent and not refused
    `ctl policy` and `ctl pause`       nothing is lost, whatever is in flight
    any other survivors, write-back   each sector holds what rule 6 allows, and nothing else

A failing run prints its seed. Not covered: `metadata` and `data` (tests/server/test_places.py), and
requests that hang, for which the load would wait.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.persistence.model import Durability, Level, Options
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.notes import NoteKind
from nbdproxy.requests import Command
from tests.support.forked import ForkedServer
from tests.support.serving import until
from tests.support.workload import SECTOR, Load, make_image, some_size

HEAD = 'summary = "s"\nimitates = "i"\n[cache]\nholds = true\n'
CUT = '[cut]\nat = ["exit"]\n'
RULES = """
[[rule]]
action = "error"
probability = 0.05
command = ["write", "flush", "trim"]
[[rule]]
action = "delay"
probability = 0.05
delay_s = 0.002
jitter_s = 0.02
[[rule]]
action = "lose"
probability = 0.05
[[rule]]
action = "tear"
probability = 0.1
[[rule]]
action = "misdirect"
shift = -1024
probability = 0.1
[[rule]]
action = "corrupt"
probability = 0.1
bits = 3
[[rule]]
action = "disconnect"
moment = "middle"
probability = 0.005
[[rule]]
action = "disconnect"
moment = "after"
probability = 0.005
[[rule]]
action = "disconnect"
probability = 0.01
[[rule]]
action = "flip"
probability = 0.2
[[rule]]
action = "stale"
probability = 0.2
"""
LATE = '[[rule]]\naction = "delay"\nprobability = 0.2\ndelay_s = 0.01\n'
FSYNCGATE = '[[rule]]\naction = "fsyncgate"\nprobability = 0.2\n'


def run(folder: Path, seed: int, policy: str) -> None:
    """Run a load under a policy until it is ended in the middle."""
    dice = random.Random(seed)
    make_image(folder / "image", dice, some_size(seed))
    (folder / "mine.toml").write_text(policy)
    options = ("--policy", folder / "mine.toml", "--seed", str(seed), "--record", folder / "run")
    with ForkedServer(folder, folder / "image", *options) as server:
        load = Load(
            server.client, seed, dice.randrange(1, 5), reconnects=True, size=some_size(seed)
        )
        enough = dice.randrange(5, 900)
        until(lambda: load.sent >= enough, "enough was sent")
        server.signal(signal.SIGTERM)
        code = server.wait()
        load.calm.set()
        load.join()
        assert code == 0, server.log


def differing(folder: Path, level: Level, choice: Choice, options: Options) -> list[int]:
    """The sectors in which the image is not the state that the recording gives at its end."""
    image = (folder / "image").read_bytes()
    source = RecordedSource(folder / "run")
    disk = open_state(source, StateId(source.events, level, choice, options))
    state = disk.pread(0, disk.size)
    disk.close()
    source.close()
    places = range(0, len(image), SECTOR)
    return [at // SECTOR for at in places if image[at : at + SECTOR] != state[at : at + SECTOR]]


def illegal(folder: Path) -> list[int]:
    """The sectors whose content rule 6 does not allow; as slow and plain as can be.

    Where requests end inside a sector, each stretch between two ends is judged for itself.
    """
    image = (folder / "image").read_bytes()
    source = RecordedSource(folder / "run")
    table, end = source.table, source.events
    durability = Durability(table)
    safe, there = durability.durable_from < end, durability.sent(slice(None), end)
    base = source.base()
    wrong = []
    ends = np.concatenate((table.offset, table.offset + table.length))
    bounds = np.unique(np.concatenate((ends, range(0, len(image), SECTOR), [len(image)])))
    for at, stop in itertools.pairwise(bounds.tolist()):
        rows = np.flatnonzero(there & (table.offset <= at) & (table.offset + table.length > at))
        last_safe = max((int(table.seq[row]) for row in rows if safe[row]), default=-1)
        contents = [base.pread(at, stop - at)] if last_safe < 0 else []
        for row in rows:
            if int(table.completed[row]) < last_safe and int(table.completed[row]) != NEVER:
                continue  # it happens before a durable one
            content = bytearray(stop - at)
            if table.command[row] == Command.WRITE:
                inside = at - int(table.offset[row])
                source.read_payload(int(table.position[row]) + inside, memoryview(content))
            contents.append(bytes(content))
        if image[at:stop] not in contents:
            wrong.append(at // SECTOR)
    base.close()
    source.close()
    return wrong


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_faults_never_reach_the_image(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, HEAD + CUT + RULES)
    assert not differing(tmp_path, Level.FLUSHED, Choice.MUST, Options()), f"seed {seed}"


@pytest.mark.parametrize("seed", range(1100, 1120))
def test_a_failed_flush_loses_what_it_had_in_hand(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, HEAD + CUT + FSYNCGATE)
    options = Options(fsyncgate=True)
    assert not differing(tmp_path, Level.FLUSHED, Choice.MUST, options), f"seed {seed}"


@pytest.mark.parametrize("seed", range(1200, 1210))
def test_all_survive(tmp_path: Path, seed: int) -> None:
    run(tmp_path, seed, HEAD + CUT + 'survives = "all"\n')
    assert not differing(tmp_path, Level.FLUSHED, Choice.ALL, Options()), f"seed {seed}"


@pytest.mark.parametrize("survives", ["prefix", "random", "torn", "all-but-one"])
@pytest.mark.parametrize("seed", range(1300, 1305))
def test_what_survives_is_legal(tmp_path: Path, seed: int, survives: str) -> None:
    run(tmp_path, seed, HEAD + CUT + f'survives = "{survives}"\n')
    assert not illegal(tmp_path), f"seed {seed}"


@pytest.mark.parametrize("order", ["oldest", "newest", "random"])
@pytest.mark.parametrize("seed", range(1400, 1405))
def test_what_was_written_back_is_legal(tmp_path: Path, seed: int, order: str) -> None:
    cache = f'window = "16K"\norder = "{order}"\nage_s = 0.01\n'
    run(tmp_path, seed, HEAD + cache + CUT + 'survives = "random"\n')
    assert not illegal(tmp_path), f"seed {seed}"


def test_the_loads_are_worth_their_name(tmp_path: Path) -> None:
    """Rules struck, flushes failed, something was lost, and the survivors are not only the safe."""
    for number, policy in enumerate([RULES, FSYNCGATE, ""]):
        folder = tmp_path / str(number)
        folder.mkdir()
        survives = "" if policy else 'survives = "random"\n'
        run(folder, 1500, HEAD + CUT + survives + policy)
        source = RecordedSource(folder / "run")
        assert [note for note in source.notes if note.kind is NoteKind.FAULT]
        source.close()
        assert differing(folder, Level.RECEIVED, Choice.ALL, Options())
        if not policy:
            assert differing(folder, Level.FLUSHED, Choice.MUST, Options())


@pytest.mark.parametrize("seed", range(1600, 1612))
def test_policies_that_change_under_load_lose_nothing(tmp_path: Path, seed: int) -> None:
    """Writes, FUA and flushes are in flight whenever another policy comes into force."""
    dice = random.Random(seed)
    make_image(tmp_path / "image", dice, some_size(seed))
    (tmp_path / "mine.toml").write_text(HEAD + FSYNCGATE.replace("0.2", "1e-9") + LATE)
    names = ["passthrough", "drop-unflushed", "reordering-cache", str(tmp_path / "mine.toml")]
    options = ("--control", tmp_path / "ctl", "--record", tmp_path / "run")
    with ForkedServer(tmp_path, tmp_path / "image", *options) as server:
        load = Load(server.client, seed, dice.randrange(1, 5), size=some_size(seed))
        for number in range(10):
            enough = load.sent + dice.randrange(1, 60)
            until(lambda enough=enough: load.sent >= enough, "the load goes on")  # type: ignore[misc]
            name = names[dice.randrange(len(names)) if number < 9 else 0]
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(tmp_path / "ctl"))
                asked = {"do": "policy", "names": [name]} if number % 4 else {"do": "pause"}
                for one in [asked, {"do": "resume"}]:
                    control.sendall(json.dumps(one).encode() + b"\n")
                    answer = json.loads(control.makefile("rb").readline())
                    assert answer["ok"], answer
        load.calm.set()
        load.join()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    assert not differing(tmp_path, Level.RECEIVED, Choice.MUST, Options()), f"seed {seed}"

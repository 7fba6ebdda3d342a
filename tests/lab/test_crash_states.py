"""SQLite in a guest, and thousands of crashes of it: no false alarm, and a real loss is found.

Each commit that SQLite told of is a mark in the recording; the check of a state knows the last mark
before its cut, and asks for all that was promised by then.
"""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.lab.guest import disk
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy, tool

pytestmark = pytest.mark.lab

MIB = 1 << 20
CHECK = f'{shlex.quote(sys.executable)} -m nbdproxy.lab.sqlite_image "$image" --committed "$mark"'


def record(folder: Path, workload: str, end: str) -> Path:
    """Run a workload on a recording nbdproxy; return the recording."""
    image, control, run = folder / "disk.img", folder / "ctl", folder / "run"
    disk.format_disk(image, 64 * MIB)
    with ForkedServer(folder, image, "--record", run, "--control", control) as server:
        uri = f"nbd+unix:///?socket={server.socket}"
        options = ("--control", control, "--end", end)
        nbdproxy("lab", "run", workload, uri, *options, timeout_s=200)
        server.signal(15)
        assert server.wait() == 0, server.log
    return run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Recordings of workloads that end with a cut, each made once."""

    @functools.cache
    def once(workload: str) -> Path:
        return record(tmp_path_factory.mktemp(workload), workload, "cut")

    return once


def explore(run: Path, *options: str, code: int) -> dict[str, object]:
    """Explore at every flush; return what --json prints."""
    done = nbdproxy(
        "explore", run, "--every", "flush", *options, "--json", code=code, timeout_s=280
    )
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("workload", "may_lose"), [("sqlite-full", 1), ("sqlite-wal-full", 0)])
def test_full_loses_nothing_in_any_state(
    recorded: Callable[[str], Path], workload: str, may_lose: int
) -> None:
    """By SQLite's design the last commit of a rollback journal may be undone, and only that."""
    run = recorded(workload)
    check = f"{CHECK} --may-lose {may_lose}"
    found = explore(run, "--check", check, "--states", "45", "--seed", "3", code=0)
    # Where a cut has few states, each is visited once, and that may be fewer than were asked for.
    visited = found["visited"]
    assert isinstance(visited, int)
    assert visited > 25
    assert found["verdicts"] == {"pass": visited, "fail": 0, "unknown": 0}
    # The same check does tell a loss: when one more is asked for than was promised.
    stricter = check.replace('"$mark"', '"committed-$((${mark#committed-} + 2))"')
    last = ("--check", stricter, "--at", "end", "--states", "2")
    nbdproxy("explore", run, *last, code=1, timeout_s=60)


def test_off_loses_and_the_loss_is_one_write(tmp_path: Path) -> None:
    run = record(tmp_path, "sqlite-off", "sync")
    found = explore(run, "--check", CHECK, "--states", "40", code=1)
    cuts = {state["state"].partition(".")[0] for state in found["failing"]}  # type: ignore[attr-defined]
    # At the last of these all had been sent, and its flush was on the way: what is missing decides.
    last = max(cuts, key=lambda cut: int(cut[1:]))
    options = ("--state", f"{last}.flushed.must", "--check", CHECK, "--json")
    least = json.loads(nbdproxy("minimize", run, *options, code=1, timeout_s=200).stdout)
    assert len({missing["request"] for missing in least["missing"]}) == 1
    [why] = {missing["safety"] for missing in least["missing"]}
    assert why in {"flush-in-flight", "flushed-later"}
    assert {owner["kind"] for missing in least["missing"] for owner in missing["owners"]} <= {
        "journal",
        "file data",
    }
    # What minimize names fails when it is opened anywhere, and with that given back it passes.
    state = tmp_path / "state.img"
    for name, committed in ((least["state"], 1), (f"{last}.flushed.all", 0)):
        state.unlink(missing_ok=True)
        nbdproxy("open", run, "--state", name, "-o", state)
        checked = ("lab", "check-sqlite", state, "--committed", "50")
        nbdproxy(*checked, code=committed)


def test_a_guest_boots_on_a_state_and_says_the_same(
    recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    run = recorded("sqlite-wal-full")
    served = tmp_path / "served"
    served.mkdir()
    with ForkedServer(served, run, command="timeline") as server:
        listed = tool("nbdinfo", "--list", f"nbd+unix:///?socket={server.socket}")
        assert all(f'export="{name}"' in listed for name in ("end", "before-exit", "riskiest"))
        # At the mark the next commits may have been on their way.
        # Twice: what the first guest's mount and recovery wrote is forgotten.
        for name, highest in [("mark%3Acommitted-20", {20, 21, 22, 23})] * 2 + [("end", {50})]:
            uri = f"nbd+unix:///{name}?socket={server.socket}"
            done = nbdproxy("lab", "run", "sqlite-check", uri, "-v", timeout_s=120)
            assert "sqlite integrity ok" in done.stderr
            assert any(f"sqlite highest {number}" in done.stderr for number in highest)
        server.signal(15)
        assert server.wait() == 0, server.log

"""When a guest that prints nothing is given up: not while it works, whatever the clock says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from nbdproxy.errors import LabError
from nbdproxy.lab.guest import accel
from nbdproxy.lab.run import _Watch
from nbdproxy.lab.workloads.workloads import RunEnd, shell


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "QUIET_S", 1.5)
    monkeypatch.setattr(accel, "TICK_S", 0.01)


def _until_trouble(script: str, within_s: float, *, idle_s: float = 0) -> Iterator[str | None]:
    """What is said of a shell script at each look, up to the first trouble."""
    with accel.running(["sh", "-c", script]) as process:
        pulse = accel.Pulse(process.pid, idle_s)
        began = time.monotonic()
        while time.monotonic() - began < within_s:
            said = pulse.trouble()
            yield said
            if said:
                return
            time.sleep(0.02)


def test_one_that_does_nothing_hangs() -> None:
    *_, last = _until_trouble("sleep 60", 20)
    assert last is not None
    assert "done nothing" in last


def test_one_that_works_does_not_hang() -> None:
    assert not any(_until_trouble("while :; do :; done", 2))


def test_one_that_computes_for_ever_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "SILENT_CPU_S", 0.3)
    *_, last = _until_trouble("while :; do :; done", 20)
    assert last is not None
    assert "processor time" in last


def test_one_that_is_to_wait_may_do_nothing_for_so_long() -> None:
    assert not any(_until_trouble("sleep 60", 2.5, idle_s=30))


def test_one_that_has_ended_is_in_no_trouble() -> None:
    with accel.running(["true"]) as process:
        process.wait()
        pulse = accel.Pulse(process.pid)
        pulse.beat()
        assert pulse.trouble() is None


def _follow(script: str) -> None:
    watch = _Watch(shell("true"), RunEnd(), None, lambda _line: None)
    watch.follow(["sh", "-c", script])


def test_a_kernel_that_only_complains_has_hung() -> None:
    began = time.monotonic()
    with pytest.raises(LabError, match=r"hangs \(it has printed nothing and done nothing"):
        _follow("while :; do echo '[  12.345678] INFO: task sync:77 blocked'; sleep 0.2; done")
    assert time.monotonic() - began < 30


def test_a_guest_that_prints_and_sleeps_is_waited_for() -> None:
    script = "n=0; while [ $n -lt 20 ]; do echo $n; n=$((n+1)); sleep 0.1; done"
    with pytest.raises(LabError, match="did not get as far as its workload"):  # not: hangs
        _follow(script)

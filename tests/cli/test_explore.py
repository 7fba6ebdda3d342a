"""`nbdproxy explore` as a user runs it: real recordings, real commands, exit codes and signals.

The recording has three sectors that chance decides on, so its eight states are known by heart.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.cli.test_timeline import Simple, record_simple
from tests.support.serving import COMMAND, Server, nbdproxy, until

HAS_B = """nbdcopy "$uri" - | head -c 8193 | tail -c 1 | grep -q B"""
"""Passes if the first sector of B is there."""
NBDSH = 'PATH="$(dirname "$(command -v nbdsh)"):$PATH" nbdsh'
"""Its own module is that of the interpreter beside it."""
SLOW = "sleep 0.2; true "


class Made(Protocol):
    """A recording made by `tests/cli/conftest.py`."""

    run: Path
    manifest: Path


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Simple:
    """A recording of three writes, the first flushed. Nobody may change it."""
    return record_simple(tmp_path_factory.mktemp("simple"))


def explore(run: Path, *words: str | Path, code: int = 0) -> Any:
    """Explore, and return what it says as JSON."""
    done = nbdproxy("explore", run, *words, "--json", "--workers", "1", code=code, timeout_s=120)
    return json.loads(done.stdout)


def rows_of(db: Path) -> list[tuple[str, int, int, str, str, str]]:
    """What does not hang on who judged when, in the order of the file."""
    with sqlite3.connect(db) as opened:
        query = "SELECT id, number, position, stage, content, verdict FROM state ORDER BY number"
        found = opened.execute(query).fetchall()
    opened.close()
    return found


def test_every_state_is_judged_and_those_that_fail_are_told(simple: Simple, tmp_path: Path) -> None:
    found = explore(simple.run, "--check", HAS_B, "--exhaustive", code=1)
    assert found["verdicts"] == {"pass": 4, "fail": 4, "unknown": 0}
    assert (found["visited"], found["model"]["states"], found["model"]["sectors"]) == (8, 8, 3)
    assert found["stages"] == {"exhaustive": 8}
    assert found["not_visited"] == {}
    assert (found["cuts"], found["cuts_possible"]) == (1, 1)
    assert (found["mode"], found["failure"], found["level"]) == (
        *("none", "host-power-loss"),
        "flushed",
    )
    assert found["checked"] + found["same_content"] + found["same_reads"] == 8
    assert found["unknown"] == []
    for number, failing in enumerate(found["failing"]):
        out = tmp_path / f"out{number}"
        nbdproxy("open", simple.run, "--state", failing["state"], "-o", out)
        disk = out.read_bytes()
        assert disk[:4096] == b"A" * 4096
        assert disk[8192:8704] == bytes(512)
    assert len({failing["state"] for failing in found["failing"]}) == 4


def test_people_are_told_what_to_do_next(simple: Simple) -> None:
    words = ("explore", simple.run, "--check", HAS_B, "--states", "9", "--workers", "1")
    said = nbdproxy(*words, code=1).stdout
    state = said.split("  fail     ")[1].split()[0]
    assert f"nbdproxy open {simple.run} --state {state} -o state.img" in said
    assert f"nbdproxy minimize {simple.run} --state {state} --check" in said
    assert "verdicts: " in said
    assert "not visited: " in said


@pytest.mark.parametrize(
    ("check", "code", "verdicts", "reason"),
    [
        ("true", 0, {"pass": 8, "fail": 0, "unknown": 0}, ""),
        ("exit 3", 2, {"pass": 0, "fail": 0, "unknown": 8}, "exit code 3"),
        ("kill -9 $$", 2, {"pass": 0, "fail": 0, "unknown": 8}, "killed by SIGKILL"),
        ("sleep 1000", 2, {"pass": 0, "fail": 0, "unknown": 8}, "longer than 0.3 s"),
        (f"{HAS_B} || exit 9", 2, {"pass": 4, "fail": 0, "unknown": 4}, "exit code 9"),
        (f"{HAS_B} && exit 9; exit 1", 1, {"pass": 0, "fail": 4, "unknown": 4}, "exit code 9"),
    ],
)
def test_an_unknown_is_never_a_pass_and_a_failure_beats_it(
    simple: Simple, check: str, code: int, verdicts: dict[str, int], reason: str
) -> None:
    limit = "0.3" if check.startswith("sleep") else "60"
    words = ("--check", check, "--exhaustive", "--time-limit", limit)
    found = explore(simple.run, *words, code=code)
    assert found["verdicts"] == verdicts
    assert all(reason in one["reason"] for one in found["unknown"])
    assert len(found["unknown"]) == verdicts["unknown"]


def test_what_a_check_leaves_running_ends_with_it(simple: Simple, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    check = f'sleep 1000 & echo $! >> {pids}; nbdinfo --size "$uri"; wait'
    explore(
        *(simple.run, "--check", check, "--exhaustive", "--no-share", "--time-limit", "0.7"),
        code=2,
    )
    found = pids.read_text().split()
    assert len(found) == 8
    until(lambda: not any(is_running(int(pid)) for pid in found), "no child is left")


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_what_a_check_sees(simple: Simple, tmp_path: Path) -> None:
    told = tmp_path / "told"
    check = f'echo "$mark $position $state" >> {told}'
    found = explore(simple.run, "--check", check, "--every", "write", "--states", "400")
    lines = [line.split() for line in told.read_text().splitlines()]
    marks = {int(position): mark for mark, position, _ in (x for x in lines if len(x) == 3)}
    assert set(marks.values()) == {"ready"}
    early = {int(x[0]) for x in lines if len(x) == 2}
    assert early
    assert max(early) < min(marks)
    assert all(f"s{x[-2]}." in x[-1] for x in lines)
    # Its words hang on the position, so nothing is shared between cuts.
    assert found["cuts"] == len(early | marks.keys()) == 5


def test_an_image_is_a_file_of_the_state(simple: Simple) -> None:
    check = (
        'nbdcopy "$uri" - | cmp - "$image" || exit 9; echo gone > "$image"; '
        f'{NBDSH} -u "$uri" -c "assert h.pread(512, 32768) == bytes(512)" '
        f'-c "h.pwrite(bytes([7]) * 512, 32768)"'
    )
    found = explore(simple.run, "--check", check, "--exhaustive")
    assert found["verdicts"] == {"pass": 8, "fail": 0, "unknown": 0}
    assert found["checked"] == 8


def test_states_that_cannot_be_told_apart_are_checked_once(simple: Simple, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    look = f"""{NBDSH} -u "$uri" -c 'import sys; sys.exit(h.pread(512, 8192) == bytes(512))'"""
    check = f"echo one >> {calls}; {look}"
    shared = explore(simple.run, "--check", check, "--exhaustive", code=1)
    assert shared["verdicts"] == {"pass": 4, "fail": 4, "unknown": 0}
    assert (shared["checked"], shared["same_reads"]) == (2, 6)
    assert len(calls.read_text().split()) == 2
    alone = explore(simple.run, "--check", check, "--exhaustive", "--no-share", code=1)
    assert (alone["checked"], alone["verdicts"]) == (8, shared["verdicts"])
    assert len(calls.read_text().split()) == 10


def test_every_flush_and_every_write(simple: Simple) -> None:
    """Three requests were written, and one flush changed what must be there."""
    flushes = explore(simple.run, "--check", "true", "--every", "flush")
    writes = explore(simple.run, "--check", "true", "--every", "write")
    assert flushes["cuts"] == 2
    assert writes["cuts"] == 5
    assert flushes["cuts_possible"] == writes["cuts_possible"] > 10
    # The write of A is eight sectors, and the three later ones are open at the end.
    everything = explore(
        simple.run, "--check", "true", "--every", "flush", "--exhaustive", "--states", "264"
    )
    assert everything["visited"] == 256 + 8
    unsafe = explore(simple.run, "--check", "true", "--mode", "unsafe", "--states", "3")
    assert unsafe["model"]["states"] == 2048
    assert unsafe["visited"] == 3


def test_a_db_holds_what_was_found_and_is_gone_on_with(simple: Simple, tmp_path: Path) -> None:
    db, calls = tmp_path / "run.db", tmp_path / "calls"
    words = ("--check", f"echo one >> {calls}; {HAS_B}", "--states", "30", "--db", db)
    found = explore(simple.run, *words, code=1)
    rows = rows_of(db)
    assert len(rows) == found["visited"] == 8
    assert (found["cuts_complete"], found["not_visited"]) == (1, {})
    assert len(calls.read_text().split()) == found["checked"]
    refused = nbdproxy("explore", simple.run, *words, code=2)
    assert "add --resume" in refused.stderr
    again = explore(simple.run, *words, "--resume", code=1)
    assert again["verdicts"] == found["verdicts"]
    assert again["failing"] == found["failing"]
    assert rows_of(db) == rows
    assert len(calls.read_text().split()) == found["checked"], "nothing was judged again"
    for other in (["--seed", "2"], ["--torn"], ["--mode", "unsafe"], ["--at", "seq:5"]):
        refused = nbdproxy("explore", simple.run, *words, *other, "--resume", code=2)
        assert "of another exploration" in refused.stderr, other
    assert rows_of(db) == rows


def test_what_was_judged_otherwise_is_not_gone_on_with(simple: Simple, tmp_path: Path) -> None:
    """Before another version, by whose rules a pass may have been none, and with another base."""
    db, base, other = tmp_path / "run.db", tmp_path / "base", tmp_path / "other"
    for file, byte in ((base, b"\0"), (other, b"\1")):
        file.write_bytes(byte * (json.loads(nbdproxy("info", simple.run, "--json").stdout)["size"]))
    words = ("explore", simple.run, "--check", "true", "--states", "3", "--db", db)
    nbdproxy(*words, "--base", base)
    nbdproxy(*words, "--base", base, "--resume")
    said = nbdproxy(*words, "--base", other, "--resume", code=2).stderr
    assert "of another exploration: its base" in said
    with closing(sqlite3.connect(db)) as verdicts:
        verdicts.execute("UPDATE about SET value = '1' WHERE key = 'version'")
        verdicts.commit()
    said = nbdproxy(*words, "--base", base, "--resume", code=2).stderr
    assert "made by another version of nbdproxy, which judged by other rules" in said


def test_any_number_of_workers_finds_the_same(simple: Simple, tmp_path: Path) -> None:
    found = []
    for name, *words in (("1", "--workers", "1"), ("2", "--workers", "2"), ("alone", "--no-share")):
        db = tmp_path / f"{name}.db"
        where = ("--every", "flush", "--states", "60", "--torn", "--stale", "--db", db)
        nbdproxy("explore", simple.run, "--check", HAS_B, *where, *words, code=1, timeout_s=120)
        found.append(rows_of(db))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 40


def test_a_check_that_looks_at_nothing_proves_nothing(simple: Simple) -> None:
    for check, blind in (("true", True), (f"{HAS_B}; true", False)):
        said = nbdproxy("explore", simple.run, "--check", check).stdout
        assert ("proves nothing" in said) == blind
        assert explore(simple.run, "--check", check)["looked"] == (not blind)
    said = nbdproxy("explore", simple.run, "--check", f"{HAS_B}; false", code=1).stdout
    assert "Every state failed: is the check itself right?" in said


def test_a_cut_with_countless_states_is_never_called_complete(tmp_path: Path) -> None:
    """Nor one that was not visited: 64 sectors that hang on chance, at each of two cuts."""
    image, run = tmp_path / "image", tmp_path / "run"
    image.write_bytes(bytes(1 << 20))
    with Server(image, "--record", run) as server:
        client = server.client()
        for start in (0, 1 << 17):
            for at in range(start, start + 64 * 512, 512):
                client.write(at, b"A" * 512)
            client.flush()
        client.disc()
        assert server.stop() == 0
    check = f"{HAS_B} || true"
    found = explore(run, "--check", check, "--every", "flush", "--states", "1")
    assert found["cuts"] > 1
    assert found["cuts_complete"] == 0
    assert found["not_visited"]


def test_more_states_can_be_asked_for_when_it_is_gone_on_with(
    simple: Simple, tmp_path: Path
) -> None:
    words = ("--check", HAS_B, "--db", tmp_path / "run.db")
    some = explore(simple.run, *words, "--states", "3", code=1)
    assert some["visited"] == 3
    assert some["not_visited"]
    whole = explore(simple.run, *words, "--states", "30", "--resume", code=1)
    assert (whole["visited"], whole["cuts_complete"], whole["not_visited"]) == (8, 1, {})


def test_files_of_a_manifest(recorded: Made, all_flushed: Made) -> None:
    found = explore(recorded.run, "--files", recorded.manifest, "--states", "60", code=1)
    assert found["verdicts"]["fail"] > 0
    assert found["verdicts"]["unknown"] == 0
    assert all(failing["counts"]["whole"] == 1 for failing in found["failing"])
    whole = explore(all_flushed.run, "--files", all_flushed.manifest, "--states", "60")
    assert whole["verdicts"] == {"pass": whole["visited"], "fail": 0, "unknown": 0}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name --files MANIFEST or --check COMMAND"),
        (["--check", " "], "name --files MANIFEST or --check COMMAND"),
        (["--check", "true", "--files", "x"], "drop one of them"),
        (["--files", "no-such-file"], "no-such-file"),
        (["--check", "true", "--at", "mark:never"], "this recording's marks are: ready"),
        (["--check", "true", "--at", "noon"], "'noon' names no instant"),
        (["--check", "true", "--at", "end", "--every", "flush"], "drop one of them"),
        (["--check", "true", "--sector", "1000"], "use 512 or 4096"),
        (["--check", "true", "--resume"], "--db"),
        (["--check", "true", "--db", "no/such/folder/x.db"], "no folder"),
        (["--check", "true", "--exhaustive", "--states", "7"], "raise the limit of 7"),
        (["--check", "true", "--recorded-as", "directsync"], "tells nothing about none"),
        (["--check", "true", "--base", "no-such-image"], "no-such-image"),
    ],
)
def test_wrong_usage_is_one_sentence(simple: Simple, words: list[str], sentence: str) -> None:
    said = nbdproxy("explore", simple.run, *words, code=2)
    assert said.stdout == ""
    lines = said.stderr.splitlines()
    assert sum(line.startswith("nbdproxy: ") for line in lines) == 1, said.stderr
    assert sentence in said.stderr.replace("\n", " ")


@pytest.mark.parametrize("words", [["--states", "0"], ["--workers", "0"], ["--time-limit", "0"]])
def test_numbers_out_of_range_are_refused(simple: Simple, words: list[str]) -> None:
    said = nbdproxy("explore", simple.run, "--check", "true", *words, code=2)
    assert words[0] in said.stderr


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        said = nbdproxy("explore", path, "--check", "true", code=2)
        assert said.stderr.count("nbdproxy: ") == 1


def descendants(pid: int) -> set[int]:
    found = set[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {child} | descendants(child)
    return found


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_in_order_and_it_can_be_gone_on(
    simple: Simple, tmp_path: Path, workers: str
) -> None:
    db, pids = tmp_path / "run.db", tmp_path / "pids"
    check = f"echo $$ >> {pids}; {SLOW}"
    words = ["explore", str(simple.run), "--mode", "unsafe", "--states", "40", "--no-share"]
    words += ["--db", str(db), "--check", check]
    process = subprocess.Popen(
        [*COMMAND, *words, "--workers", workers],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until(lambda: counted(db) > 0, "a unit is done")
        family = descendants(process.pid)
        # As a terminal does: to the whole group in the foreground.
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err, err
    assert f"go on with --db {db} --resume" in " ".join(err.split())
    family |= set(map(int, pids.read_text().split()))
    until(lambda: not any(is_running(pid) for pid in family), "nobody is left behind")
    assert len(rows_of(db)) < 40
    nbdproxy(*words, "--resume", "--workers", "1")
    whole = tmp_path / "whole.db"
    words[words.index(str(db)) :] = [str(whole), "--check", "true"]
    nbdproxy(*words, "--workers", "1")
    assert rows_of(db) == rows_of(whole)


def test_a_killed_run_is_gone_on_with(simple: Simple, tmp_path: Path) -> None:
    db = tmp_path / "run.db"
    words = ["explore", str(simple.run), "--check", SLOW, "--mode", "unsafe", "--states", "40"]
    words += ["--db", str(db), "--workers", "1", "--no-share"]
    with subprocess.Popen(
        [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        until(lambda: counted(db) > 0, "a unit is done")
        process.kill()
    done = counted(db)
    assert 0 < done < 40
    nbdproxy(*words, "--resume")
    assert [number for _, number, *_ in rows_of(db)] == list(range(40))


def counted(db: Path) -> int:
    if not db.exists():
        return 0
    with sqlite3.connect(db) as opened:
        try:
            [(count,)] = opened.execute("SELECT count(*) FROM state")
        except sqlite3.OperationalError:
            count = 0
    opened.close()
    return int(count)

"""info, log, manifest, replay and open on a recorded ext4: the shapes, codes and verdicts.

Not covered: what the verdicts are for real guests (the lab's tests), how the table looks.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nbdproxy.cli.app import app
from tests.cli.conftest import Recorded
from tests.support.ext4 import FLUSHED, SIZE, UNFLUSHED, content
from tests.support.serving import nbdproxy

MODES = ["none", "writeback", "writethrough", "directsync", "unsafe"]
FAILURES = ["guest-reset", "guest-poweroff", "qemu-kill", "host-power-loss", "storage-loss"]
Cells = dict[tuple[str, str], dict[str, Any]]


def replay(recorded: Recorded, *options: str, code: int = 1) -> dict[str, Any]:
    words = ("replay", recorded.run, "--files", recorded.manifest, "--json")
    found = json.loads(nbdproxy(*words, *options, code=code).stdout)
    assert isinstance(found, dict)
    return found


def cells(found: dict[str, Any]) -> Cells:
    return {(cell["mode"], cell["failure"]): cell for cell in found["cells"]}


def whole(cell: dict[str, Any]) -> int:
    return int(cell["worst"]["conditions"].get("whole", 0))


def test_replay_json_has_the_promised_shape(recorded: Recorded) -> None:
    found = replay(recorded)
    assert found["recording"] == str(recorded.run)
    assert found["files"] == 2
    assert set(found["cut"]) >= {"text", "position", "time_s"}
    table = cells(found)
    assert set(table) == {(mode, failure) for mode in MODES for failure in FAILURES}
    for (_, failure), cell in table.items():
        assert cell["verdict"] in ("pass", "fail", "unknown")
        expected = "end" if failure == "guest-poweroff" else "before-exit"
        assert cell["cut"]["text"] == expected
        for side in ("worst", "best"):
            assert isinstance(cell[side]["state"], str)
            assert sum(cell[side]["conditions"].values()) == 2
            assert set(cell[side]["causes"]) <= {"unflushed", "flushed-then-lost"}


def test_what_was_not_flushed_is_lost_where_the_mode_caches(recorded: Recorded) -> None:
    table = cells(replay(recorded))
    for mode in ("none", "writeback"):
        cell = table[mode, "host-power-loss"]
        assert cell["verdict"] == "fail"
        assert cell["worst"]["conditions"] == {"whole": 1, "missing": 1}
        assert cell["worst"]["causes"] == {"unflushed": 1}
        assert cell["best"]["conditions"] == {"whole": 2}
    for mode in ("writethrough", "directsync"):
        assert table[mode, "host-power-loss"]["verdict"] == "pass"
    unsafe = table["unsafe", "host-power-loss"]["worst"]
    assert unsafe["conditions"] == {"missing": 2}
    assert unsafe["causes"] == {"unflushed": 1, "flushed-then-lost": 1}


def test_what_was_flushed_is_whole_wherever_a_flush_counts(all_flushed: Recorded) -> None:
    for (mode, failure), cell in cells(replay(all_flushed)).items():
        ignored = (mode, failure) == ("unsafe", "host-power-loss") or failure == "storage-loss"
        assert whole(cell) == (0 if ignored else 2), (mode, failure)
        assert cell["verdict"] == ("fail" if ignored else "pass"), (mode, failure)


@pytest.mark.parametrize("at", ["before-exit", "end", "flush:1", "seq:6", "seq:20"])
def test_a_safer_mode_never_loses_more(recorded: Recorded, at: str) -> None:
    table = cells(replay(recorded, "--at", at))
    for failure in FAILURES:
        found = {mode: whole(table[mode, failure]) for mode in MODES}
        assert found["writethrough"] >= found["writeback"] >= found["unsafe"], failure
        assert found["directsync"] >= found["none"] >= found["unsafe"], failure
    for mode in MODES:
        kill, loss = table[mode, "qemu-kill"], table[mode, "host-power-loss"]
        assert whole(kill) >= whole(loss) >= whole(table[mode, "storage-loss"]), mode


def test_before_the_flush_nothing_was_safe(recorded: Recorded) -> None:
    before = replay(recorded, "--at", "seq:3", "--mode", "none", "--failure", "host-power-loss")
    assert whole(before["cells"][0]) == 0
    after = replay(recorded, "--at", "flush:1", "--mode", "none", "--failure", "host-power-loss")
    assert whole(after["cells"][0]) == 1
    assert after["cells"][0]["worst"]["causes"] == {"never-sent": 1}


def test_a_killed_recorders_recording_is_replayed_and_says_so(killed: Recorded) -> None:
    words = ("replay", killed.run, "--files", killed.manifest, "--failure", "host-power-loss")
    done = nbdproxy(*words, "--json", code=1)
    assert "did not end in order" in done.stderr
    table = cells(json.loads(done.stdout))
    assert whole(table["none", "host-power-loss"]) == 1
    assert whole(table["writethrough", "host-power-loss"]) == 2


def test_the_exit_code_tells_of_loss(recorded: Recorded) -> None:
    words = ("replay", recorded.run, "--files", recorded.manifest)
    lossless = ("--mode", "writethrough,directsync", "--failure", "host-power-loss")
    assert nbdproxy(*words, *lossless, code=0).stdout
    told = nbdproxy(*words, code=1).stdout
    # Long names are broken at their hyphens, so that the table fits a terminal.
    words_of_failures = [word for failure in FAILURES for word in failure.split("-", 1)]
    for word in (*MODES, *words_of_failures, "1 of 2 whole", "unflushed"):
        assert word in told
    assert "Whose fault: 1 of 2 files had been written" in told


def test_open_rebuilds_the_state_that_replay_named(recorded: Recorded, tmp_path: Path) -> None:
    table = cells(replay(recorded))
    cell = table["none", "host-power-loss"]
    out = tmp_path / "state"
    nbdproxy("open", recorded.run, "--state", cell["worst"]["state"], "-o", out)
    listed = nbdproxy("manifest", out).stdout
    assert FLUSHED in listed
    assert UNFLUSHED not in listed
    choice = ("--at", "before-exit", "--mode", "none", "--failure", "host-power-loss")
    nbdproxy("open", recorded.run, *choice, "-o", tmp_path / "same")
    assert (tmp_path / "same").read_bytes() == out.read_bytes()
    nbdproxy("open", recorded.run, "--state", cell["best"]["state"], "-o", tmp_path / "best")
    assert (tmp_path / "best").read_bytes() == recorded.image.read_bytes()


def test_open_serves_a_state_and_changes_nothing(recorded: Recorded) -> None:
    before = recorded.image.read_bytes()
    command = 'nbdinfo --size "$uri"; qemu-io -f raw -c "write -P 65 0 4M" "$uri" >&2'
    done = nbdproxy("open", recorded.run, "--at", "flush:1", "--run", command)
    assert done.stdout == f"{SIZE}\n"
    assert recorded.image.read_bytes() == before
    assert nbdproxy("open", recorded.run, "--at", "end", "--run", "exit 5", code=5)


def test_open_writes_qcow2(recorded: Recorded, tmp_path: Path) -> None:
    out = tmp_path / "state.qcow2"
    nbdproxy("open", recorded.run, "--at", "end", "-o", out, "--format", "qcow2")
    assert out.read_bytes()[:4] == b"QFI\xfb"


@pytest.mark.parametrize("where", ["image", "run", "run@end"])
def test_manifest_lists_the_files_with_digest_and_size(recorded: Recorded, where: str) -> None:
    listed = json.loads(nbdproxy("manifest", recorded.folder / where, "--json").stdout)
    found = {entry["path"]: entry for entry in listed}
    for name in (FLUSHED, UNFLUSHED):
        entry = found["/" + name]
        assert entry["sha256"] == hashlib.sha256(content(name)).hexdigest()
        assert entry["size"] == len(content(name))


def test_manifest_of_a_cut_lists_what_had_been_sent(recorded: Recorded) -> None:
    listed = nbdproxy("manifest", f"{recorded.run}@flush:1").stdout
    assert FLUSHED in listed
    assert UNFLUSHED not in listed


def test_manifest_of_a_folder_fits_replay(recorded: Recorded, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / FLUSHED).write_bytes(content(FLUSHED))
    (tmp_path / "files").write_text(nbdproxy("manifest", folder).stdout)
    words = ("replay", recorded.run, "--files", tmp_path / "files", "--failure", "host-power-loss")
    nbdproxy(*words, "--mode", "none", code=0)
    nbdproxy(*words, "--mode", "unsafe", code=1)


def test_info_sums_the_recording_up(recorded: Recorded) -> None:
    facts = json.loads(nbdproxy("info", recorded.run, "--verify", "--json").stdout)
    assert facts["image"] == str(recorded.image)
    assert facts["size"] == SIZE
    assert facts["policies"] == ["passthrough"]
    assert facts["ended"] == "ended by SIGTERM"
    assert facts["missing"] is None
    assert facts["connections"] == 1
    assert facts["requests"]["flush"]["count"] == 1
    assert facts["requests"]["write"]["count"] > 10
    assert facts["requests"]["write"]["failed"] == facts["requests"]["write"]["unanswered"] == 0
    assert facts["recorded_under"] == ["none", "unsafe", "writeback"]
    assert "ended by SIGTERM" in nbdproxy("info", recorded.run).stdout


def test_log_lists_requests_and_notes_in_order(recorded: Recorded) -> None:
    lines = nbdproxy("log", recorded.run, "--json").stdout.splitlines()
    items = [json.loads(line) for line in lines]
    assert [item["seq"] for item in items] == sorted(item["seq"] for item in items)
    kinds = [item["type"] for item in items]
    assert kinds[:2] == ["policy", "connect"]
    assert kinds[-1] == "end"
    assert kinds.count("flush") == 1
    writes = [item for item in items if item["type"] == "write"]
    assert all(item["length"] == 4096 and item["error"] is None for item in writes)
    assert all(item["completed"] > item["seq"] for item in writes)


def test_log_selects_by_type_cut_and_range(recorded: Recorded) -> None:
    def log(*options: str) -> list[dict[str, Any]]:
        out = nbdproxy("log", recorded.run, "--json", *options).stdout
        return [json.loads(line) for line in out.splitlines()]

    (flush,) = log("--type", "flush")
    early, late = log("--to", "flush:1"), log("--from", "flush:1")
    assert max(item["seq"] for item in early) <= flush["completed"]
    assert min(item["seq"] for item in late) > flush["completed"]
    near = log("--type", "write", "--range", "0-4K")
    assert near
    assert all(item["offset"] == 0 for item in near)
    everything = nbdproxy("log", recorded.run).stdout.splitlines()
    assert len(everything) == len(log())


def commands() -> list[list[str]]:
    """Every command there is, those of groups included."""
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found += [[name, inner] for inner in getattr(command, "commands", ())] or [[name]]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_commands_help_has_an_example(command: list[str]) -> None:
    words = ["ctl", "vm/ctl.sock", *command[1:]] if command[0] == "ctl" else command
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0
    assert "Example" in done.output
    assert "nbdproxy " + " ".join(words) in done.output


def test_no_command_waits_for_the_imports_of_another() -> None:
    """All of them take over a second."""
    script = (
        "import sys; from nbdproxy.cli.app import app; app(['--version'], standalone_mode=False);"
        "print(sorted({'numpy', 'trio'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == ["[]"]

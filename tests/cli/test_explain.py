"""`nbdproxy explain` as a user runs it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, cast

import pytest

from nbdproxy.crash.blame.explain import FileExplanation
from nbdproxy.crash.blame.file_history import LEVELS, ConditionChange, FileHistory, LevelHistory
from nbdproxy.crash.blame.replay import Replay
from nbdproxy.crash.states.cuts import Cut
from nbdproxy.crash.states.source import Source
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.persistence.modes import CacheMode
from nbdproxy.report.histories import lines
from tests.support.ext4 import BLOCK, FLUSHED, SIZE, UNFLUSHED, content, stages
from tests.support.nbd_client import FUA
from tests.support.serving import Server, nbdproxy


class Made(Protocol):
    """A recording made by `tests/cli/conftest.py`."""

    folder: Path
    run: Path
    manifest: Path


def explain(run: Path, *words: str | Path, code: int) -> Any:
    """Explain, and return what it says as JSON."""
    return json.loads(nbdproxy("explain", run, *words, "--json", code=code).stdout)


def test_a_flushed_file_was_safe_from_its_flush_on(recorded: Made) -> None:
    [history] = explain(recorded.run, f"/{FLUSHED}", code=1)
    sent, answered, flushed = (history["levels"][k]["whole_since"] for k in history["levels"])
    assert sent["position"] < answered["position"] < flushed["position"]
    assert history["created"] is not None
    assert 0 < history["created"]["position"] <= sent["position"]
    since = history["protected_since"]
    assert since["none"] == since["writeback"] == flushed
    assert since["writethrough"] == since["directsync"] == answered
    assert since["unsafe"] is None
    fates = {cell["mode"]: cell["fate"] for cell in history["cells"]}
    assert fates["none"] == "whole"
    assert "flushed-then-lost" in fates["unsafe"]
    assert {request["safety"] for request in history["carried_by"]} <= {
        "promise-broken",
        "never-flushed",
    }
    assert any("file data" in " ".join(c["what"]) for c in history["carried_by"])


def test_an_unflushed_file_was_not_and_advice_is_given(recorded: Made) -> None:
    words = ("explain", recorded.run, UNFLUSHED, "--mode", "none,writethrough")
    said = nbdproxy(*words, code=1).stdout
    assert said.startswith(f"/{UNFLUSHED}, 50,000 bytes\n")
    assert "unflushed: It was written and not flushed." in said
    assert "writethrough: whole" in said
    assert "carried by request" in said
    assert ", which has it whole, has more:" in said
    assert "no flush came after it" in said
    assert len(said.splitlines()) < 40, "one screen"
    [history] = explain(recorded.run, UNFLUSHED, "--mode", "none", code=1)
    [lost] = history["lost"].values()
    assert {(r["cause"], r["safety"]) for r in lost["ranges"]} == {("data", "never-flushed")}
    assert lost["ranges"][0]["start"] == 0
    assert lost["ranges"][-1]["end"] == 50_000
    assert any("inode table" in part["what"] for part in lost["metadata"])
    fine = nbdproxy("explain", recorded.run, UNFLUSHED, "--mode", "writethrough", code=0).stdout
    assert "It was written" not in fine


def test_when_everything_is_safe(recorded: Made, all_flushed: Made) -> None:
    for made, code, flushed in ((all_flushed, 0, 2), (recorded, 1, 1)):
        words = ("--files", made.manifest)
        found = explain(made.run, *words, code=code)
        assert found["files"] == 2
        assert found["instants"][0]["sent"] == 0
        last = found["instants"][-1]
        assert (last["sent"], last["answered"]) == (2, 2)
        assert last["flushed"] == flushed
        said = nbdproxy("explain", made.run, *words, code=code).stdout
        expected = "everything is safe from" if flushed == 2 else "1 file never became safe"
        assert f"Under none and writeback {expected}" in said


def test_under_writethrough_nothing_is_said_of_modes_that_need_flushes(tmp_path: Path) -> None:
    """The guest's flushes may not be in such a recording: every write carries FUA."""
    images = stages(tmp_path)
    image, run, files = (tmp_path / name for name in ("image", "run", "files"))
    image.write_bytes(images[0])
    with Server(image, "--record", run) as server:
        client = server.client()
        for at in range(0, SIZE, BLOCK):
            if images[0][at : at + BLOCK] != images[2][at : at + BLOCK]:
                client.write(at, images[2][at : at + BLOCK], FUA)
        client.disc()
        assert server.stop() == 0
    files.write_text(f"{hashlib.sha256(content(FLUSHED)).hexdigest()}  /{FLUSHED}\n")
    said = nbdproxy("explain", run, "--files", files).stdout
    assert "Of none and writeback nothing can be told: every write carries FUA" in said
    assert "Under writethrough and directsync everything is safe from" in said


def test_a_disk_that_cannot_be_read_is_not_called_unsafe(tmp_path: Path) -> None:
    image, run, files = (tmp_path / name for name in ("image", "run", "files"))
    image.write_bytes(bytes(1 << 20))
    with Server(image, "--record", run) as server:
        client = server.client()
        client.write(0, b"no filesystem that we know " * 4096)
        client.disc()
        assert server.stop() == 0
    files.write_text(f"{'0' * 64}  /file\n")
    said = nbdproxy("explain", run, "--files", files, "--root", "/", code=2).stderr
    assert "nothing can be read: whole disk is something unknown" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "which file?"),
        (["/no/such"], "is not in what was sent"),
        (["/nothing"], "is not in what was sent to the disk by the end"),
        ([f"/{FLUSHED}", "--at", "noon"], "names no instant"),
        ([f"/{FLUSHED}", "--mode", "fast"], "--mode"),
        (["--files", "x", "--at", "end"], "are for single files"),
        ([f"/{number}" for number in range(30)], "too many"),
    ],
)
def test_wrong_usage_is_one_sentence(recorded: Made, words: list[str], sentence: str) -> None:
    said = nbdproxy("explain", recorded.run, *words, code=2)
    assert said.stdout == ""
    assert said.stderr.count("nbdproxy: ") == 1
    assert sentence in said.stderr


def test_a_file_that_was_never_sent_needs_a_manifest(recorded: Made, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.write_text(recorded.manifest.read_text() + f"{'0' * 64}  /never\n")
    [history] = explain(recorded.run, "/never", "--files", files, code=1)
    assert history["carried_by"] == []
    assert all("never-sent" in cell["fate"] for cell in history["cells"])
    said = nbdproxy("explain", recorded.run, "/other", "--files", files, code=2).stderr
    assert "is not in the manifest" in said


def test_a_file_that_was_sent_after_the_cut_is_not_called_never_sent(recorded: Made) -> None:
    words = ("--files", recorded.manifest, "--root", "/", "--at", "seq:0")
    said = nbdproxy("explain", recorded.run, f"/{FLUSHED}", *words, code=1).stdout
    assert "It was not yet sent at this cut; it was sent " in said
    assert "No cache mode can help" not in said


def test_of_a_file_that_cannot_be_told_no_never_is_said() -> None:
    level = LevelHistory((ConditionChange(0, Condition.CANNOT_BE_TOLD),))
    history = FileHistory(Entry("/a", "0" * 64, 1), dict.fromkeys(LEVELS, level))
    table = Replay(Manifest((history.entry,)), Tree(), Cut("end", 0), frozenset(CacheMode), (), ())
    told = FileExplanation(history, (), table, {})
    said = list(lines(told, cast(Source, None)))
    assert not [line for line in said if "never" in line]
    assert len([line for line in said if line.endswith("cannot be told")]) == 4


@pytest.mark.parametrize("root", ["/", "//", "/.", "/lost+found/..", ""])
def test_a_file_has_one_name_in_all_answers(recorded: Made, root: str) -> None:
    """Its absolute path in the guest, however the root is written."""
    words = ("--files", recorded.manifest, "--root", root, "--mode", "none")
    [told] = explain(recorded.run, UNFLUSHED, *words, code=1)
    assert told["path"] == f"/{UNFLUSHED}"
    failure = ("--failure", "host-power-loss", "--list", "--json")
    [cell] = json.loads(nbdproxy("replay", recorded.run, *words, *failure, code=1).stdout)["cells"]
    assert list(cell["worst"]["files"]) == [told["path"]]
    state = ("--failure", "host-power-loss", "--at", "before-exit")
    checked = nbdproxy("check", recorded.run, *words, *state, "--list", "--json", code=1).stdout
    assert list(json.loads(checked)["lost"]) == [told["path"]]

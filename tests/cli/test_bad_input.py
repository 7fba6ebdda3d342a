"""Bad input: one clear sentence on stderr, nothing on stdout, exit code 2, never a traceback.

Not covered: every single policy key and manifest line; their rooms test those.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Recorded
from tests.support.serving import Server, nbdproxy, tool


def refused(*arguments: str | Path) -> str:
    """Run a command that must refuse its input; return its one sentence."""
    done = nbdproxy(*arguments, code=2)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("nbdproxy: ")
    return lines[0]


def serve(image: Path, *options: str | Path) -> str:
    return refused("serve", image, "--run", "true", *options)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(64 * 1024))
    return path


@pytest.fixture
def copy(recorded: Recorded, tmp_path: Path) -> Path:
    """A recording that may be damaged."""
    return Path(shutil.copytree(recorded.run, tmp_path / "copy"))


def replay(run: Path, files: Path, *options: str) -> str:
    return refused("replay", run, "--files", files, *options)


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no image" in serve(tmp_path / "nothing")


def test_a_folder_as_image(tmp_path: Path) -> None:
    assert "is a folder" in serve(tmp_path)


def test_an_empty_image(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "truncate -s" in serve(tmp_path / "empty")


def test_a_qcow2_file_without_format(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    assert "--format raw" in serve(path)
    with path.open("r+b") as file:
        file.truncate(1 << 20)
    assert "--format raw" in serve(path)
    assert nbdproxy("serve", path, "--format", "raw", "--run", 'nbdinfo "$uri"').stdout


def test_an_unknown_policy_gets_a_suggestion(image: Path) -> None:
    assert "did you mean drop-unflushed?" in serve(image, "--policy", "drop-unflushd")


def test_a_policy_file_that_is_not_there(image: Path, tmp_path: Path) -> None:
    assert "there is no policy file" in serve(image, "--policy", tmp_path / "none.toml")


def test_an_unknown_key_of_a_policy_is_named_with_its_file(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('summary = "s"\nimitates = "i"\n[cache]\nhold = true\n')
    told = serve(image, "--policy", path)
    assert f"{path}: cache.hold: unknown key" in told
    assert "did you mean cache.holds?" in told


def test_options_that_exclude_each_other(image: Path, tmp_path: Path) -> None:
    told = serve(image, "--socket", tmp_path / "s", "--listen", "127.0.0.1:0")
    assert "--socket and --listen" in told
    assert "--read-only and --overlay" in serve(image, "--read-only", "--overlay")


def test_a_socket_in_use(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(512))
    with Server(other, "--socket", tmp_path / "s"):
        assert "in use by another server" in serve(image, "--socket", tmp_path / "s")


def test_a_folder_to_record_to_that_is_not_empty(image: Path, tmp_path: Path) -> None:
    assert "not empty" in serve(image, "--record", tmp_path)
    assert "is a file" in serve(image, "--record", image)
    assert not (tmp_path / "events").exists()


def test_a_recording_that_is_not_there(recorded: Recorded, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    for words in (["info"], ["log"], ["open", "--at", "end"]):
        assert "there is no recording" in refused(words[0], nothing, *words[1:])
    assert "there is no recording" in replay(nothing, recorded.manifest)


def test_a_folder_that_is_no_recording(recorded: Recorded, tmp_path: Path) -> None:
    for command in ("info", "log"):
        assert "is not a recording" in refused(command, tmp_path)
    assert "is not a recording" in replay(tmp_path, recorded.manifest)


def test_a_file_in_a_recordings_place(recorded: Recorded) -> None:
    refused("info", recorded.manifest)


def test_a_recording_cut_in_the_middle_opens_and_says_so(copy: Path) -> None:
    events = copy / "events"
    half = events.stat().st_size // 2 + 17
    with events.open("r+b") as file:
        file.truncate(half)
    told = nbdproxy("info", copy).stdout
    assert "not in order" in told
    assert "missing     cut off or damaged after event" in told
    assert nbdproxy("log", copy, code=2).stdout


def test_a_recording_cut_off_at_once(recorded: Recorded, copy: Path) -> None:
    with (copy / "events").open("r+b") as file:
        file.truncate(10)
    assert "no complete event" in refused("info", copy)
    assert "no complete event" in refused("log", copy)
    assert "no complete event" in replay(copy, recorded.manifest)


def test_a_recording_that_lacks_its_data(copy: Path) -> None:
    (copy / "data").unlink()
    assert "is not a recording" in refused("info", copy)


def test_a_damaged_payload_is_found(recorded: Recorded, copy: Path) -> None:
    data = bytearray((copy / "data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "data").write_bytes(data)
    assert "is damaged" in refused("info", copy, "--verify")
    assert "is damaged" in refused(
        "open", copy, "--at", "end", "--base", recorded.image, "-o", copy / "out"
    )
    assert not (copy / "out").exists()


@pytest.mark.parametrize(
    "cut", ["nonsense", "seq:", "seq:99999", "flush:99", "flush:0", "time:1h", "time:9999s",
            "mark:none", "seq:-1"]
)  # fmt: skip
def test_a_cut_that_the_recording_lacks(recorded: Recorded, cut: str) -> None:
    for told in (
        replay(recorded.run, recorded.manifest, "--at", cut),
        refused("open", recorded.run, "--at", cut, "-o", recorded.folder / "never"),
        refused("log", recorded.run, "--to", cut),
    ):
        assert repr(cut) in told
        assert "use" in told or "marks are" in told or "write time:" in told


def test_a_mode_or_failure_that_does_not_exist(recorded: Recorded) -> None:
    told = replay(recorded.run, recorded.manifest, "--mode", "none,wrightback")
    assert "'wrightback' is unknown; choose from none, writeback" in told
    told = replay(recorded.run, recorded.manifest, "--failure", "fire")
    assert "choose from guest-reset" in told
    assert "--mode is empty" in replay(recorded.run, recorded.manifest, "--mode", ",")


def test_a_manifest_that_matches_nothing(recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "files").write_text("0" * 64 + "  nowhere/nothing\n")
    assert "matches nothing" in replay(recorded.run, tmp_path / "files")


def test_a_manifest_that_is_empty_missing_or_none(recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "is empty" in replay(recorded.run, tmp_path / "empty")
    assert "No such file" in replay(recorded.run, tmp_path / "nothing")
    assert f"{recorded.image}:1: not a line" in replay(recorded.run, recorded.image)


def test_a_manifest_of_nothing(image: Path, tmp_path: Path) -> None:
    assert "no filesystem" in refused("manifest", image)
    (tmp_path / "folder").mkdir()
    assert "there are no files" in refused("manifest", tmp_path / "folder")
    refused("manifest", tmp_path / "nothing")
    assert "no recording" in refused("manifest", f"{tmp_path}/nothing@end")


@pytest.mark.parametrize("state", ["", "garbage", "s1", "s1.flushed.maybe", "s1.flushed.must+x"])
def test_a_state_id_that_is_none(recorded: Recorded, state: str) -> None:
    assert "not the id of a crash state" in refused("open", recorded.run, "--state", state)


def test_a_state_of_another_recording(recorded: Recorded) -> None:
    told = refused("open", recorded.run, "--state", "s999999.flushed.must")
    assert "of another recording" in told


def test_open_without_or_with_too_many_choices(recorded: Recorded) -> None:
    run = recorded.run
    assert "--state ID or --at CUT" in refused("open", run)
    assert "go together" in refused("open", run, "--at", "end", "--mode", "none")
    told = refused("open", run, "--at", "end", "--state", "s1.flushed.must")
    assert "--state says all" in told


def test_a_range_or_type_that_is_none(recorded: Recorded) -> None:
    assert "is not a range" in refused("log", recorded.run, "--range", "5-1")
    assert "is unknown" in refused("log", recorded.run, "--type", "wriet")


def test_an_image_that_was_changed_after_the_recording(tmp_path: Path) -> None:
    """What the recording never touched is in the image only, so a change of it must be noticed."""
    image, run, keep = tmp_path / "image", tmp_path / "run", tmp_path / "keep"
    image.write_bytes(b"-" * 64 * 1024)
    with Server(image, "--record", run) as server:
        with server.client() as client:
            client.write(0, b"A" * 4096)
        assert server.stop() == 0
    shutil.copy(image, keep)
    with image.open("r+b") as file:
        file.seek(32768)
        file.write(b"B")
    told = refused("open", run, "--at", "end", "-o", tmp_path / "out")
    assert "was changed after the recording ended" in told
    assert "--base IMAGE" in told
    nbdproxy("open", run, "--at", "end", "-o", tmp_path / "out", "--base", keep)
    assert (tmp_path / "out").read_bytes() == keep.read_bytes()
    image.unlink()
    assert "not there any more" in refused("open", run, "--at", "end", "-o", tmp_path / "x")


def test_an_output_that_cannot_be_written(recorded: Recorded, tmp_path: Path) -> None:
    out = tmp_path / "no" / "folder"
    assert "cannot be written" in refused("open", recorded.run, "--at", "end", "-o", out)


@pytest.mark.parametrize("words", [["nonsense"], ["serve"], ["replay", "x"], ["log", "x", "--no"]])
def test_usage_errors_have_code_2_and_no_traceback(words: list[str]) -> None:
    assert nbdproxy(*words, code=2).stderr


def test_what_newcomers_name_by_mistake_is_told_in_plain_words(tmp_path: Path) -> None:
    files, pack, run = (tmp_path / name for name in ("files", "run1.nbdpack", "run"))
    files.write_text(f"{'0' * 64}  /a\n", encoding="utf-16")
    assert "is UTF-16" in nbdproxy("replay", run, "--files", files, code=2).stderr
    files.write_text(f"{'0' * 64}  /a\n")
    pack.write_bytes(b"packed")
    assert "nbdproxy unpack" in nbdproxy("replay", pack, "--files", files, code=2).stderr
    twice = nbdproxy("replay", run, run, "--files", files, code=2).stderr
    assert "is named twice" in twice

"""`nbdproxy audit` as a user runs it: real servers above each other, real stores, real culprits."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import ForkedServer
from tests.support.lower import nbdkit, qemu_nbd
from tests.support.nbd_client import NbdClient
from tests.support.serving import nbdproxy, tool

MIB = 1 << 20
A, B, C = (letter * 4096 for letter in (b"A", b"B", b"C"))


def new_image(path: Path) -> Path:
    """An image of 1 MiB that holds an O at 4096."""
    path.write_bytes(bytes(4096) + b"O" * 4096 + bytes(MIB - 8192))
    return path


def some_requests(client: NbdClient) -> None:
    """A is flushed; B and C are not, and C takes the place of what was there."""
    client.write(65536, A)
    client.flush()
    client.write(131072, B)
    client.write(4096, C)


def record(folder: Path, *options: str | Path, image: Path | None = None) -> Path:
    """Record some requests on an image, all flushed in the end; return the recording."""
    image = image or new_image(folder / "image")
    with ForkedServer(folder, image, "--record", folder / "run", *options) as server:
        with server.client() as client:
            some_requests(client)
            client.flush()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    return folder / "run"


def audit(run: Path, store: Path | str, *words: str, code: int) -> Any:
    """Audit, and return what it says as JSON."""
    done = nbdproxy("audit", run, store, *words, "--json", code=code, timeout_s=60)
    return json.loads(done.stdout)


def sizes(found: Any) -> dict[str, int]:
    """How many bytes there are of each fate, but for what is as it was sent."""
    return {fate: size for fate, size in found["bytes"].items() if size and fate != "as-sent"}


def above(folder: Path, policy: str) -> tuple[Path, Path]:
    """Record above another nbdproxy with a policy, which is then killed: its power goes.

    Returns the upper recording, which notices and ends, and the image.
    """
    upper, lower = folder / "upper", folder / "lower"
    upper.mkdir()
    lower.mkdir()
    image = new_image(folder / "image")
    with ForkedServer(lower, image, "--policy", policy) as below:
        uri = f"nbd+unix:///?socket={below.socket}"
        with ForkedServer(upper, uri, "--record", upper / "run") as server:
            some_requests(server.client())
            below.signal(signal.SIGKILL)
            below.wait()
            assert server.wait() == 2, server.log
    return upper / "run", image


def test_all_that_was_sent_is_there(tmp_path: Path) -> None:
    run = record(tmp_path)
    found = audit(run, tmp_path / "image", code=0)
    assert found["bytes"]["as-sent"] == found["compared"] == 3 * 4096
    assert (found["never_sent"], found["broken"], found["places"]) == (MIB - 3 * 4096, False, [])
    said = nbdproxy("audit", run, tmp_path / "image").stdout
    assert "No promise was broken: all that was sent is there" in said
    assert "requests touched 12 KiB of it" in said


def test_a_lower_layer_that_lies_is_convicted_and_the_upper_is_cleared(tmp_path: Path) -> None:
    run, image = above(tmp_path, "lying-flush")
    found = audit(run, image, code=1)
    assert sizes(found) == {"broken-promise": 4096, "unflushed": 8192}
    assert (found["broken"], found["own_policies"]) == (True, [])
    [broken] = [place for place in found["places"] if place["fate"] == "broken-promise"]
    assert (broken["offset"], broken["length"]) == (65536, 4096)
    assert "durable by flush" in broken["should_hold"]
    assert broken["holds"] == "what was there before the recording"
    said = nbdproxy("audit", run, image, code=1).stdout
    assert "A promise was broken below nbdproxy, in nbd+unix://" in said
    assert "The guest and QEMU are cleared" in said
    assert "on purpose" not in said


@pytest.mark.parametrize(("policy", "fault"), [("lying-flush", "lying-flush/lies"), ("unsafe", "")])
def test_who_lies_itself_says_so(tmp_path: Path, policy: str, fault: str) -> None:
    image = new_image(tmp_path / "image")
    options = ("--record", tmp_path / "run", "--policy", policy)
    with ForkedServer(tmp_path, image, *options) as server:
        with server.client() as client:
            some_requests(client)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    assert audit(tmp_path / "run", image, code=1)["own_policies"] == [policy]
    said = nbdproxy("audit", tmp_path / "run", image, code=1).stdout
    assert f"may have done it on purpose: {policy}. Look there first." in said
    assert fault in said
    assert "are cleared" not in said


@pytest.mark.parametrize("flushes", [0, 2])
def test_a_recording_without_a_write_tells_nothing(tmp_path: Path, flushes: int) -> None:
    image = new_image(tmp_path / "image")
    with ForkedServer(tmp_path, image, "--record", tmp_path / "run") as server:
        with server.client() as client:
            for _ in range(flushes):
                client.flush()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    assert audit(tmp_path / "run", image, code=2)["broken"] is None
    said = nbdproxy("audit", tmp_path / "run", image, code=2).stdout
    assert "cannot be told whether a promise was broken" in said
    assert "nothing that was written is in the recording" in said
    assert "No promise was broken" not in said


def test_what_no_flush_covered_may_be_lost(tmp_path: Path) -> None:
    run, image = above(tmp_path, "drop-unflushed")
    found = audit(run, image, code=0)
    assert sizes(found) == {"unflushed": 8192}
    assert {place["offset"]: place["holds"] for place in found["places"]} == {
        131072: "what was there before the recording",
        4096: "what was there before the recording",
    }
    said = nbdproxy("audit", run, image).stdout
    assert "No promise was broken: what was sent last and is not there was not safe" in said
    assert "never-flushed (2)" in said
    assert "Who should have flushed stands above nbdproxy" in said


def test_a_recording_that_was_cut_off_convicts_nobody(tmp_path: Path) -> None:
    image = new_image(tmp_path / "image")
    with ForkedServer(tmp_path, image, "--record", tmp_path / "run") as server:
        some_requests(server.client())
        server.signal(signal.SIGKILL)
        server.wait()
    assert audit(tmp_path / "run", image, code=0)["broken"] is None
    poked(image, 65536, bytes(512))
    assert audit(tmp_path / "run", image, code=2)["broken"] is None
    said = nbdproxy("audit", tmp_path / "run", image, code=2).stdout
    assert "It cannot be told whether a promise was broken" in said
    assert "are cleared" not in said


def test_what_was_trimmed_is_not_compared(tmp_path: Path) -> None:
    image = new_image(tmp_path / "image")
    with ForkedServer(tmp_path, image, "--record", tmp_path / "run") as server:
        with server.client() as client:
            some_requests(client)
            client.trim(0, 8192)
            client.flush()
        server.signal(signal.SIGTERM)
        server.wait()
    poked(image, 512, b"X" * 512)
    found = audit(tmp_path / "run", image, code=0)
    assert sizes(found) == {"trimmed": 8192}
    [place] = found["places"]
    assert place["holds"] == "whatever a TRIM left"


def poked(image: Path, offset: int, data: bytes) -> None:
    """Change the store behind nbdproxy's back."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "fate", "holds"),
    [
        (65536, b"X" * 512, "foreign", "something that was never sent"),
        (65536 + 3584, bytes(512), "broken-promise", "what was there before the recording"),
        (4096, bytes(512), "broken-promise", "zeroes that nobody wrote"),
        (4096, b"O" * 512, "broken-promise", "what was there before the recording"),
    ],
)
def test_a_single_sector_is_found(
    tmp_path: Path, offset: int, data: bytes, fate: str, holds: str
) -> None:
    run = record(tmp_path)
    poked(tmp_path / "image", offset, data)
    found = audit(run, tmp_path / "image", code=1)
    assert sizes(found) == {fate: 512}
    assert found["changed_since"]
    [place] = found["places"]
    assert (place["offset"], place["holds"]) == (offset, holds)
    said = nbdproxy("audit", run, tmp_path / "image", code=1).stdout
    assert "was changed after the recording ended: what follows holds only if nobody" in said
    assert "The guest and QEMU are cleared" not in said
    if fate == "broken-promise":
        assert "If nobody else wrote to it since, a promise was broken below nbdproxy, in" in said
        assert "The guest and QEMU are then cleared" in said


def test_a_store_that_has_nothing_of_what_was_sent_may_be_another(tmp_path: Path) -> None:
    run = record(tmp_path)
    other = tmp_path / "other"
    other.write_bytes(b"X" * (tmp_path / "image").stat().st_size)
    said = nbdproxy("audit", run, other, code=1).stdout
    assert f"is {other} what was recorded?" in said
    assert f"or it damaged its data below nbdproxy, in {other}" in said


def test_an_older_request_shows_its_number(tmp_path: Path) -> None:
    image = new_image(tmp_path / "image")
    with ForkedServer(tmp_path, image, "--record", tmp_path / "run") as server:
        with server.client() as client:
            client.write(65536, B)
            client.flush()
            client.write(65536, A)
            client.flush()
        server.signal(signal.SIGTERM)
        server.wait()
    poked(image, 65536, B)
    [place] = audit(tmp_path / "run", image, code=1)["places"]
    assert (place["fate"], place["length"]) == ("broken-promise", 4096)
    assert place["holds_request"] < place["durable"]
    assert place["holds"].startswith(f"request {place['holds_request']}, a write of 4,096 bytes")


def test_a_qcow2_file_as_its_guest_sees_it_and_as_bytes(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    run = record(tmp_path, "--format", "qcow2", image=image)
    assert sizes(audit(run, image, code=0)) == {}
    with qemu_nbd(tmp_path, image, "--format=qcow2") as below:
        assert sizes(audit(run, below.uri, code=0)) == {}
    again = tmp_path / "again"
    again.mkdir()
    with ForkedServer(again, image, "--format", "qcow2") as server:
        with server.client() as client:
            client.write(65536, b"X" * 512)
        server.signal(signal.SIGTERM)
        server.wait()
    assert sizes(audit(run, image, code=1)) == {"foreign": 512}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a recording and its image. Nobody may change them."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    yield folder


def small(folder: Path) -> Path:
    (folder / "small").write_bytes(bytes(4096))
    return folder / "small"


@pytest.mark.parametrize(
    ("store", "sentence"),
    [
        (small, "name the store of this recording"),
        (lambda folder: folder / "nowhere", "there is no image at"),
        (lambda _: "nbd+unix:///?socket=/nowhere", "cannot be used"),
        (lambda _: "nbd://", "nbd://"),
    ],
)
def test_wrong_usage_is_one_sentence(
    recorded: Path, tmp_path: Path, store: Callable[[Path], Path | str], sentence: str
) -> None:
    said = nbdproxy("audit", recorded / "run", store(tmp_path), code=2)
    assert said.stdout == ""
    assert said.stderr.count("nbdproxy: ") == 1
    assert sentence in said.stderr


def test_a_store_over_nbd_that_is_too_small_or_breaks_is_one_sentence(
    recorded: Path, tmp_path: Path
) -> None:
    with qemu_nbd(tmp_path, small(tmp_path)) as below:
        said = nbdproxy("audit", recorded / "run", below.uri, code=2).stderr
        assert said.count("nbdproxy: ") == 1
        assert "name the store of this recording" in said
    broken = ("--filter=error", "memory", "size=1M", "error-pread=EIO", "error-pread-rate=100%")
    with nbdkit(tmp_path, *broken) as below:
        said = nbdproxy("audit", recorded / "run", below.uri, code=2).stderr
        assert "cannot be read" in said
        assert "Traceback" not in said


def test_an_imported_log_is_refused(recorded: Path, tmp_path: Path) -> None:
    log, back = tmp_path / "log", tmp_path / "back"
    nbdproxy("convert", recorded / "run", log, "--to", "dm-log-writes")
    nbdproxy("convert", log, back, "--to", "nbdproxy", "--size", "1M")
    assert "was imported" in nbdproxy("audit", back, recorded / "image", code=2).stderr


def test_a_recording_that_never_reached_the_store_is_refused(tmp_path: Path) -> None:
    run = record(tmp_path, "--overlay")
    assert "--overlay" in nbdproxy("audit", run, tmp_path / "image", code=2).stderr
    said = nbdproxy("audit", run, "nbd://localhost/", "--format", "raw", code=2).stderr
    assert "--format is for files" in said


def test_nothing_is_written_to_the_store(recorded: Path) -> None:
    image = recorded / "image"
    before = image.stat().st_mtime_ns, image.read_bytes()
    audit(recorded / "run", image, code=0)
    assert (image.stat().st_mtime_ns, image.read_bytes()) == before

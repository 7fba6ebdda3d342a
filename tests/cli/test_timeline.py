"""`nbdproxy timeline` as a user runs it: every state of a recording under its name."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.serving import COMMAND, DEADLINE_S, Server, nbdproxy, tool

SIZE = 65536
LAST = b"Z" * 512
"""What stands in the image's last sector and is never written: the recording needs the image."""
STATES = 50


@dataclass(frozen=True)
class Simple:
    """A recording: A is written and flushed, marked `ready`, then B and C are written."""

    run: Path
    image: Path


def record_simple(folder: Path) -> Simple:
    """Record it with a real server and a real client."""
    image, run, control = folder / "image", folder / "run", folder / "control"
    with image.open("wb") as file:
        file.seek(SIZE - 512)
        file.write(LAST)
    with Server(image, "--record", run, "--control", control) as server:
        client = server.client()
        client.write(0, b"A" * 4096)
        client.flush()
        nbdproxy("ctl", control, "mark", "ready")
        client.write(8192, b"B" * 1024)
        client.write(16384, b"C" * 512)
        client.disc()
        assert server.stop() == 0
    return Simple(run, image)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Simple:
    """The recording. Nobody may change it."""
    return record_simple(tmp_path_factory.mktemp("simple"))


class Served:
    """A running `nbdproxy timeline RUN`; ready when the constructor returns. A context manager."""

    def __init__(self, run: Path, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "timeline", str(run), *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        self.line = self.process.stdout.readline().strip() if ready else ""
        if not self.line:
            self.process.kill()
            raise AssertionError(f"it said nothing: {self.process.communicate()[1]}")

    def uri(self, name: str) -> str:
        """The URI of a state, made from that of `end` as the command tells its user to."""
        scheme, rest = self.line.split("/end?")
        return f"{scheme}/{quote(name, safe='')}?{rest}"

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Send a signal; return the exit code and what was said on stderr."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, err

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def served(simple: Simple, tmp_path: Path) -> Iterator[Served]:
    """All states of the recording."""
    with Served(simple.run, "--socket", tmp_path / "socket") as running:
        yield running


def opened(simple: Simple, folder: Path, *choice: str) -> bytes:
    """A state as `nbdproxy open` writes it."""
    out = folder / "opened"
    out.unlink(missing_ok=True)
    nbdproxy("open", simple.run, *choice, "-o", out)
    return out.read_bytes()


def copied(served: Served, name: str, folder: Path) -> bytes:
    """A state as libnbd reads it."""
    out = folder / "copied"
    tool("nbdcopy", served.uri(name), out)
    return out.read_bytes()


def events_of(simple: Simple) -> int:
    told: int = json.loads(nbdproxy("info", simple.run, "--json").stdout)["events"]
    return told


def seqs_of(simple: Simple) -> list[int]:
    """The writes, in order: A, B and C."""
    lines = nbdproxy("log", simple.run, "--type", "write", "--json").stdout.splitlines()
    return [int(json.loads(line)["seq"]) for line in lines]


def test_cuts_are_as_open_writes_them(simple: Simple, served: Served, tmp_path: Path) -> None:
    a, b, c = b"A" * 4096, b"B" * 1024, b"C" * 512

    def disk_of(content: bytes) -> bytes:
        return content.ljust(SIZE - 512, b"\0") + LAST

    full = disk_of(a + bytes(4096) + b + bytes(7168) + c)
    first, second, _ = seqs_of(simple)
    expected = {
        "end": full,
        "before-exit": full,
        "mark:ready": disk_of(a),
        "flush:1": disk_of(a),
        f"seq:{first}": disk_of(a),
        f"seq:{second}": disk_of(a + bytes(4096) + b),
        "seq:0": disk_of(b""),
    }
    for name, disk in expected.items():
        assert copied(served, name, tmp_path) == disk, name
        assert opened(simple, tmp_path, "--at", name) == disk, name


def test_fifty_states_one_after_the_other(simple: Simple, served: Served, tmp_path: Path) -> None:
    events = events_of(simple)
    _, b, c = seqs_of(simple)
    names = [f"s{events}.flushed.draw3-{number}" for number in range(STATES - 5)]
    names += [f"s{events}.flushed.{word}" for word in ("must", "all", f"but{b}", f"only{b}:1")]
    names += [f"s{events}.flushed.must~16=base~32={c}"]
    disks = {name: copied(served, name, tmp_path) for name in names}
    for name in [*names[:3], *names[-5:]]:
        assert disks[name] == opened(simple, tmp_path, "--state", name), name
    assert 6 <= len(set(disks.values())) <= 8, "three sectors hang on chance"
    for disk in disks.values():
        assert disk[:4096] == b"A" * 4096
        assert set(disk[8192:9216]) <= set(b"\0B")
    assert {name: copied(served, name, tmp_path) for name in names[:3]}.items() <= disks.items()


def test_writes_are_seen_by_their_own_connection_only(served: Served, simple: Simple) -> None:
    before = simple.image.read_bytes()
    with NbdClient(served.uri("end")) as one, NbdClient(served.uri("end")) as other:
        one.write(0, b"1" * 512)
        other.write(512, b"2" * 512)
        one.flush()
        assert one.read(0, 1024) == b"1" * 512 + b"A" * 512
        assert other.read(0, 1024) == b"A" * 512 + b"2" * 512
    with NbdClient(served.uri("end")) as third:
        assert third.read(0, 1024) == b"A" * 1024
    assert simple.image.read_bytes() == before


def test_names_are_listed_and_others_refused(served: Served) -> None:
    listed = json.loads(tool("nbdinfo", "--list", "--json", served.uri("")))
    names = [export["export-name"] for export in listed["exports"]]
    assert names == ["end", "before-exit", "riskiest", "mark:ready"]
    assert {export["export-size"] for export in listed["exports"]} == {SIZE}
    for name in ("nothing", "s999999.flushed.must", "mark:never", "flush:2"):
        tool("nbdinfo", served.uri(name), code=1)
    tool("nbdinfo", served.uri("end"))


def test_uris_as_json(simple: Simple) -> None:
    with Served(simple.run, "--json") as running:
        assert running.process.stdout is not None
        text = running.line
        while not text.rstrip().endswith("}") or text.count("{") != text.count("}"):
            text += running.process.stdout.readline()
        told = json.loads(text)
        assert list(told) == ["uri", "cuts"]
        assert list(told["cuts"]) == ["end", "before-exit", "riskiest", "mark:ready"]
        for uri in told["cuts"].values():
            assert tool("nbdinfo", "--size", uri).strip() == str(SIZE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(simple: Simple, tmp_path: Path, number: int) -> None:
    socket = tmp_path / "socket"
    with Served(simple.run, "--socket", socket) as running:
        assert running.line == f"nbd+unix:///end?socket={socket}"
        client = NbdClient(running.line)
        assert client.read(0, 512) == b"A" * 512
        code, err = running.end(number)
        client.drop()
    assert code == 0, err
    assert "Traceback" not in err
    assert not os.path.lexists(socket)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "there is no recording at nowhere"),
        (["{run}", "--base", "nowhere"], "nowhere"),
        (["{run}", "--socket", "no/such/folder/socket"], "no/such/folder"),
    ],
)
def test_wrong_usage_is_one_sentence(simple: Simple, words: list[str], sentence: str) -> None:
    given = [word.format(run=simple.run) for word in words]
    said = nbdproxy("timeline", *given, code=2)
    assert said.stdout == ""
    assert said.stderr.count("nbdproxy: ") == 1
    assert sentence in " ".join(said.stderr.split())

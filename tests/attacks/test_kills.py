"""kill -9 in every phase of a server and of the commands that write, a few seeds each.

After each kill: what was acknowledged is in the recording, which opens or is one sentence; and the
same command again works, or says in a sentence what to do, whatever the killed one left behind.

Kills under load with every policy, judged against the persistence model, are in
tests/laws/test_killed_proxy.py; of a recording that is read to pieces, in tests/laws/
test_recording.py; at a full disk, in test_full_disks.py; of `explore` and its workers, in
tests/crash/test_verdicts.py and test_workers.py. Not covered: a power loss (test_power_loss.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdproxy.recording.index import NEVER
from nbdproxy.recording.reader import Recording
from tests.support.exploring import ODD
from tests.support.fork_server import shared
from tests.support.forked import ForkedServer
from tests.support.nbd_client import FLUSH, FUA, WRITE, NbdClient, Op
from tests.support.serving import DEADLINE_S, nbdproxy, until

BLOCK = 4096
SIZE = 1 << 20
SEEDS = range(3)


def block(number: int) -> bytes:
    """The content of write `number`, which goes to a block of its own."""
    return number.to_bytes(8, "big") * (BLOCK // 8)


@dataclass
class Clients:
    """Threads, a connection each, that write and flush until the server is gone."""

    path: Path
    flushes: bool = False
    acknowledged: list[int] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    _next: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, count: int) -> None:
        """Begin."""
        for _ in range(count):
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run(self) -> None:
        with suppress(OSError):
            client = NbdClient.at(self.path)
            try:
                while True:
                    self._write(client)
            finally:
                client.drop()

    def _write(self, client: NbdClient) -> None:
        with self._lock:
            numbers = range(self._next, self._next + 3)
            self._next += 3
        flags = FUA if self.flushes else 0
        ops = [
            Op(WRITE, one * BLOCK % SIZE, data=block(one), flags=flags * (one % 2))
            for one in numbers
        ]
        cookies = dict(zip(client.send(*ops), numbers, strict=True))
        if self.flushes:
            client.send(Op(FLUSH))
        for _ in range(len(cookies) + self.flushes):
            cookie, reply = client.receive()
            if reply.error not in {0, 108}:  # 108: it came too late
                self.wrong.append(reply.error)
            if cookie in cookies and not reply.error:
                self.acknowledged.append(cookies[cookie])

    def join(self) -> None:
        """Wait for all of them."""
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        assert not self.wrong


@contextmanager
def started(folder: Path, *options: str | Path) -> Iterator[int]:
    """A server on `folder/socket` that records to `folder/run`; it is killed at the end."""
    words = ["serve", folder / "image", "--socket", folder / "socket", "--record", folder / "run"]
    pid = shared().start([str(one) for one in [*words, *options]], folder / "out", folder / "err")
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        until(lambda: shared().ended(pid) is not None, "the server is gone")


def recorded(run: Path) -> set[int]:
    """The numbers of the writes that a recording says were done, each checked."""
    numbers, buffer = set(), memoryview(bytearray(BLOCK))
    with Recording(run) as recording:
        recording.verify()
        table = recording.table
        is_done = (table.position >= 0) & (table.completed != NEVER) & (table.error == 0)
        for position in table.position[is_done].tolist():
            recording.read_payload(position, buffer)
            number = int.from_bytes(buffer[:8], "big")
            assert buffer == block(number)
            numbers.add(number)
    return numbers


def check_and_go_on(folder: Path, acknowledged: list[int], *, may_have_ended: bool = False) -> None:
    """The recording has all of it, or never was one; and the next server serves."""
    run = folder / "run"
    told = nbdproxy("info", run, "--verify", code=None)
    if told.returncode or not (run / "events").exists():
        assert told.returncode == 2
        assert told.stderr.startswith("nbdproxy: ") and told.stderr.count("\n") == 1, told.stderr
        assert not acknowledged
    else:
        assert set(acknowledged) <= recorded(run)
        assert may_have_ended or "did not end in order" in told.stdout
    options: list[str | Path] = [
        "serve",
        folder / "image",
        "--socket",
        folder / "socket",
        "--record",
        run,
    ]
    if run.exists() and any(run.iterdir()):
        refused = nbdproxy(*options, code=2).stderr
        assert "exists and is not empty; name a new folder, or remove it first" in refused
        shutil.rmtree(run)
    with ForkedServer(folder, folder / "image", "--record", run) as server:
        with server.client() as client:
            client.write(0, block(0))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert recorded(run) == {0}
    assert not list(folder.rglob("*.part")) and not (folder / "socket").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "image").write_bytes(bytes(SIZE))
    return tmp_path


def wait_at_random(dice: random.Random, most_s: float) -> None:
    """Let the other process come to any point."""
    time.sleep(dice.random() * most_s)


@pytest.mark.parametrize("seed", range(5))
def test_before_the_first_request(folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    with started(folder):
        wait_at_random(dice, 0.12)
    check_and_go_on(folder, [])


def hello(sock: socket.socket) -> None:
    """What a client says: flags, GO, and a write whose payload is cut off."""
    said = struct.pack(">I", 3)
    said += struct.pack(">8sIIIHH", b"IHAVEOPT", 7, 8, 0, 1, 3)
    said += struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 4096) + bytes(100)
    sock.sendall(said[: random.randrange(1, len(said))])


@pytest.mark.parametrize("seed", SEEDS)
def test_during_negotiation(folder: Path, seed: int) -> None:
    random.seed(seed)
    with started(folder):
        until(lambda: (folder / "out").exists() and (folder / "out").read_text() != "", "it serves")
        socks = [socket.socket(socket.AF_UNIX) for _ in range(8)]
        for sock in socks:
            sock.connect(str(folder / "socket"))
            hello(sock)
        wait_at_random(random.Random(seed), 0.01)
    for sock in socks:
        sock.close()
    check_and_go_on(folder, [])


LOADS = {
    "under load": (8, False, ()),
    "during flushes": (3, True, ()),
    "during durable flushes": (3, True, ("--sync-recording",)),
    "while flushes land": (3, True, ("--policy", "drop-unflushed")),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("told", [False, True], ids=["at once", "told to end"])
def test_while_clients_write(folder: Path, load: str, told: bool, seed: int) -> None:
    """Also a moment after it was told to end; each of them may be acknowledged or not."""
    dice = random.Random(f"{load} {told} {seed}")
    count, flushes, options = LOADS[load]
    clients = Clients(folder / "socket", flushes=flushes)
    with started(folder, *options) as pid:
        until(lambda: (folder / "out").exists() and (folder / "out").read_text() != "", "it serves")
        clients.start(count)
        enough = dice.randrange(1, 60 if flushes else 300)
        until(lambda: len(clients.acknowledged) >= enough, "enough is written")
        if told:
            os.kill(pid, signal.SIGTERM)
            wait_at_random(dice, 0.03)
    clients.join()
    check_and_go_on(folder, clients.acknowledged, may_have_ended=told)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recording `run` of 6 MiB, an image, and a pack of both. Only to be read."""
    folder = tmp_path_factory.mktemp("made")
    dice = random.Random(0)
    size = 4 << 20
    (folder / "image").write_bytes(dice.randbytes(size))
    with ForkedServer(folder, folder / "image", "--record", folder / "run") as server:
        with server.client() as client:
            for number in range(48):
                at = dice.randrange(size // 131072) * 131072
                client.write(at, dice.randbytes(131072))
                if number % 16 == 0:
                    client.flush()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    nbdproxy("pack", folder / "run", "-o", folder / "packed")
    return folder


COMMANDS: dict[str, Callable[[Path, Path], list[str | Path]]] = {
    "pack": lambda made, out: ["pack", made / "run", "-o", out],
    "unpack": lambda made, out: ["unpack", made / "packed", "-o", out],
    "open raw": lambda made, out: ["open", made / "run", "--at", "end", "-o", out],
    "open qcow2": lambda made, out: [
        *("open", made / "run", "--at", "end", "--format", "qcow2", "-o", out),
    ],
    "convert": lambda made, out: ["convert", made / "run", out, "--to", "dm-log-writes"],
    "convert back": lambda made, out: ["convert", made / "replayed", out, "--to", "nbdproxy"],
}


def run_and_kill(words: list[str | Path], folder: Path, after_s: float) -> None:
    """Run a command and kill it so much later, if it still runs then."""
    pid = shared().start([str(word) for word in words], folder / "said", folder / "said")
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until(lambda: shared().ended(pid) is not None, "it is gone")


def content(path: Path) -> dict[str, object]:
    """The digest of each file; of a converted recording, which has its time in it, the size."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if (path / "events").exists() and not (path / "base").exists():
        nbdproxy("info", path, "--verify")
        return {file.name: file.stat().st_size for file in files}
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_while_a_command_writes_a_file(made: Path, tmp_path: Path, command: str) -> None:
    """What has the name is whole; the same command then works, or says that it is there."""
    if not (made / "replayed").exists():
        nbdproxy(*COMMANDS["convert"](made, made / "replayed"))
    began = time.monotonic()
    nbdproxy(*COMMANDS[command](made, tmp_path / "whole"))
    took_s = time.monotonic() - began
    whole = content(tmp_path / "whole")
    for seed in SEEDS:
        dice, folder = random.Random(seed), tmp_path / f"{seed}"
        folder.mkdir()
        words = COMMANDS[command](made, folder / "out")
        run_and_kill(words, folder, dice.random() * took_s)
        if (folder / "out").exists():
            assert content(folder / "out") == whole, f"seed {seed}"
            assert "exists" in nbdproxy(*words, code=2).stderr
        else:
            nbdproxy(*words)
            assert content(folder / "out") == whole, f"seed {seed}"


@pytest.fixture(scope="module")
def explored(made: Path) -> str:
    """The verdicts of an exploration that nobody killed."""
    return verdicts(nbdproxy(*exploring(made, made / "db"), code=1).stdout)


def exploring(made: Path, path: Path) -> list[str | Path]:
    """A command that judges 24 states."""
    words: list[str | Path] = ["explore", made / "run", "--db", path, "--check", ODD, "--json"]
    return [*words, "--states", "24", "--workers", "1"]


def verdicts(told: str) -> str:
    """What an exploration found."""
    found = json.loads(told)
    return json.dumps([found["visited"], found["verdicts"], found["failing"]])


@pytest.mark.parametrize("seed", SEEDS)
def test_while_verdicts_are_written(made: Path, explored: str, tmp_path: Path, seed: int) -> None:
    """The same command says how to go on, and that ends as it would have."""
    words = exploring(made, tmp_path / "db")
    run_and_kill(words, tmp_path, random.Random(seed).random())
    again = nbdproxy(*words, code=None)
    if again.returncode == 2:
        assert "exists; add --resume to go on with it" in again.stderr
        again = nbdproxy(*words, "--resume", code=1)
    assert verdicts(again.stdout) == explored

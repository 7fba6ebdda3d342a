"""`nbdproxy ctl` against a running `nbdproxy serve --control`: each answer comes after the effect.

Not covered: QEMU's events (tests/laws/test_cut_events.py).
"""

from __future__ import annotations

import json
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.recording.notes import NoteKind
from tests.support.forked import ForkedServer
from tests.support.nbd_client import EIO, FLUSH, WRITE, NbdError, Op
from tests.support.serving import nbdproxy, until

SECTOR = 512
SIZE = 64 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


def serve(image: Path, *options: str | Path) -> ForkedServer:
    folder = image.parent
    return ForkedServer(
        folder, image, "--control", folder / "ctl", "--record", folder / "run", *options
    )


def ctl(image: Path, *words: str, code: int = 0) -> Any:
    return nbdproxy("ctl", image.parent / "ctl", *words, code=code)


def status(image: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(ctl(image, "status", "--json").stdout)
    return told


def end(server: ForkedServer) -> None:
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.log


def sectors(image: Path, count: int = 4) -> str:
    content = image.read_bytes()
    return "".join(chr(content[at * SECTOR]) for at in range(count))


def test_status(image: Path) -> None:
    with serve(image, "--policy", "bad-sectors", "--set", "share=1.0") as server:
        client = server.client()
        client.write(0, b"A" * SECTOR)
        client.flush()
        with pytest.raises(NbdError):
            client.read(SECTOR, SECTOR)
        told = status(image)
        (export,) = told["exports"]
        assert told["power"] == "on"
        assert export["size"] == SIZE
        assert export["policies"] == ["bad-sectors"]
        assert (export["writes"], export["flushes"], export["written_bytes"]) == (1, 1, SECTOR)
        assert export["reads"] == 1
        assert export["rules"] == {"bad-sectors/unreadable": 1}
        assert not export["paused"]
        words = ctl(image, "status").stdout
        assert "rule bad-sectors/unreadable struck 1 time" in words
        client.disc()
        end(server)


def test_the_cut_is_over_when_ctl_returns(image: Path) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        client = server.client()
        client.write(0, b"A" * SECTOR)
        client.flush()
        client.write(SECTOR, b"B" * SECTOR)
        assert "512 B were held back" in ctl(image, "cut").stderr
        assert sectors(image) == "A---"
        with pytest.raises(OSError):
            client.write(0, b"C" * SECTOR)
        assert server.wait() == 0
        client.drop()
    source = RecordedSource(image.parent / "run")
    assert (NoteKind.CUT, "nbdproxy ctl cut") in [(n.kind, n.text) for n in source.notes]
    source.close()


def test_a_mark_is_an_instant_of_the_recording(image: Path) -> None:
    with serve(image) as server:
        client = server.client()
        client.write(0, b"A" * SECTOR)
        ctl(image, "mark", "here")
        client.write(0, b"B" * SECTOR)
        client.disc()
        end(server)
    source = RecordedSource(image.parent / "run")
    cut = resolve(source, "mark:here")
    first, second = source.table.seq
    assert first < cut.position <= second
    source.close()


def test_a_rule_waits_for_a_mark(image: Path, tmp_path: Path) -> None:
    policy = tmp_path / "mine.toml"
    policy.write_text(
        'summary = "s"\nimitates = "i"\n'
        '[[rule]]\naction = "error"\ncommand = "write"\nsince = "mark:go"\nuntil = "mark:stop"\n'
    )
    with serve(image, "--policy", policy) as server:
        client = server.client()
        client.write(0, b"A" * SECTOR)
        ctl(image, "mark", "go")
        with pytest.raises(NbdError) as failed:
            client.write(0, b"B" * SECTOR)
        assert failed.value.errno == EIO
        ctl(image, "mark", "stop")
        client.write(SECTOR, b"C" * SECTOR)
        client.disc()
        end(server)
    assert sectors(image) == "AC--"


def test_a_pause_drains_and_flushes(image: Path) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        client = server.client()
        client.write(0, b"A" * SECTOR)
        assert sectors(image) == "----"
        ctl(image, "pause")
        assert sectors(image) == "A---"
        assert status(image)["exports"][0]["paused"]
        client.send(Op(WRITE, SECTOR, data=b"B" * SECTOR), Op(FLUSH))
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.receive()
        assert sectors(image) == "A---"
        client.sock.settimeout(20)
        ctl(image, "resume")
        assert not any(reply.error for reply in client.collect(list(client.waiting)).values())
        assert not status(image)["exports"][0]["paused"]
        client.disc()
        end(server)


def test_a_pause_waits_for_what_was_begun(image: Path) -> None:
    """A flush that is slow is answered before the pause is."""
    with serve(image, "--policy", "slow-flush", "--set", "delay_s=0.7") as server:
        client = server.client()
        client.send(Op(FLUSH))
        until(lambda: status(image)["exports"][0]["flushes"] == 1, "the flush is there")
        ctl(image, "pause")
        client.sock.settimeout(0.2)
        _, reply = client.receive()
        assert not reply.error
        client.disc()
        end(server)


def test_an_end_in_a_pause_is_in_order(image: Path) -> None:
    with serve(image) as server:
        client = server.client()
        ctl(image, "pause")
        client.send(Op(WRITE, 0, data=b"A" * SECTOR))
        end(server)
        client.drop()
    source = RecordedSource(image.parent / "run")
    assert source.missing is None
    source.close()


def test_another_policy(image: Path) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        client = server.client()
        client.write(0, b"A" * SECTOR)
        ctl(image, "policy", "misdirected-writes", "--set", "probability=1.0")
        assert sectors(image) == "A---"
        client.write(0, b"B" * SECTOR)
        assert client.read(0, SECTOR) == b"A" * SECTOR
        assert status(image)["exports"][0]["shown_bytes"] == 2 * SECTOR
        assert "1 KiB read again as they are" in ctl(image, "lift").stderr
        assert client.read(0, SECTOR) == b"B" * SECTOR
        ctl(image, "policy", "drop-unflushed")
        client.write(SECTOR, b"C" * SECTOR)
        ctl(image, "cut")
        client.drop()
        assert server.wait() == 0
    assert sectors(image) == "B---"
    source = RecordedSource(image.parent / "run")
    policies = [json.loads(n.text)["policies"] for n in source.notes if n.kind is NoteKind.POLICY]
    assert policies == [["drop-unflushed"], ["misdirected-writes"], ["drop-unflushed"]]
    source.close()


@pytest.mark.parametrize("policy", ["drop-unflushed", "passthrough", "gluster-write-behind"])
def test_a_change_of_policy_under_load_loses_nothing(image: Path, policy: str) -> None:
    with serve(image) as server:
        client = server.client()
        done = threading.Event()
        wrote: list[int] = []

        def load() -> None:
            while not done.is_set():
                at = len(wrote) % 128
                client.write(at * SECTOR, bytes([65 + len(wrote) % 26]) * SECTOR)
                wrote.append(at)

        thread = threading.Thread(target=load)
        thread.start()
        for name in (policy, "passthrough", policy):
            before = len(wrote)
            ctl(image, "policy", name)
            until(lambda before=before: len(wrote) > before, "the load goes on")  # type: ignore[misc]
        done.set()
        thread.join()
        expected = {at: 65 + number % 26 for number, at in enumerate(wrote)}
        shown = {at: client.read(at * SECTOR, 1 * SECTOR)[0] for at in expected}
        assert shown == expected
        client.flush()
        client.disc()
        end(server)
    content = image.read_bytes()
    assert {at: content[at * SECTOR] for at in expected} == expected


WRONG = {
    ("policy", "nothing"): "there is no policy named nothing",
    ("policy", "fsyncgate", "--set", "x=1"): "there is no parameter x",
    ("mark", ""): "a mark has a name",
    ("status", "--export", "other"): "there is no export 'other'",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=[" ".join(w) for w in WRONG])
def test_what_is_wrong_is_told(image: Path, words: tuple[str, ...], message: str) -> None:
    with serve(image) as server:
        assert message in ctl(image, *words, code=2).stderr
        assert status(image)["exports"][0]["policies"] == ["passthrough"]
        end(server)


def test_nobody_listens(tmp_path: Path) -> None:
    told = nbdproxy("ctl", tmp_path / "none", "status", code=2).stderr
    assert "does not answer" in told
    assert "is nbdproxy serve --control" in told


@pytest.mark.parametrize(
    "line", [b"\n", b"{}\n", b"[1]\n", b'{"do": "explode"}\n', b"\xff\n", b'{"do": ["cut"]}\n',
             b'{"do": "policy", "names": 1}\n', b'{"do": "mark", "name": 7}\n']
)  # fmt: skip
def test_garbage_gets_an_answer_and_the_next_command_too(image: Path, line: bytes) -> None:
    with serve(image) as server:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(image.parent / "ctl"))
            sock.sendall(line + b'{"do": "status"}\n')
            lines = sock.makefile("rb")
            first, second = json.loads(lines.readline()), json.loads(lines.readline())
        assert not first["ok"]
        assert "error" in first
        assert second["ok"]
        end(server)


def test_the_socket_is_its_owners_and_goes_with_the_server(image: Path) -> None:
    with serve(image) as server:
        path = image.parent / "ctl"
        assert path.stat().st_mode & 0o777 == 0o600
        end(server)
        assert not path.exists()

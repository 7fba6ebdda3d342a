"""Control socket and monitor: depth, length and floods end nothing and hold up nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdproxy.server.below.qmp import QmpListener
from tests.support.forked import ForkedServer
from tests.support.nbd_client import NbdClient
from tests.support.serving import COMMAND, DEADLINE_S, Server, nbdproxy, until

SIZE = 64 * 1024
SOON_S = 5.0
"""On a busy machine; what is tried here used to last for ever."""

DEEP = b'{"event":' + b"[" * 100_000 + b"\n"
LINES = {
    "brackets": b"[" * 100_000 + b"\n",
    "objects": b'{"do":' * 30_000 + b"\n",
    "event": DEEP,
    "closed": b'{"event": "A", "data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
    "number": b'{"do": "policy", "names": ["passthrough"], "seed": ' + b"9" * 5000 + b"}\n",
    "infinite": b'{"do": "policy", "names": ["passthrough"], "seed": 1e999}\n',
    "surrogate": b'{"do": "policy", "names": ["\\ud800/x"]}\n',
    "NUL": b'{"do": "policy", "names": ["a\\u0000/b"], "settings": ["\\u0000"]}\n',
    "UTF-16": '{"do": "status"}\n'.encode("utf-16"),
    "event name": b'{"event": "\\ud800"}\n{"event": "A B"}\n{"event": ""}\n{"event": 1}\n',
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a server looks for QEMU's monitor."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "qmp"))
        listening.listen()
        listening.settimeout(DEADLINE_S)
        yield listening


@pytest.fixture
def server(image: Path, monitor: socket.socket) -> Iterator[ForkedServer]:
    folder = image.parent
    options = ("--control", folder / "ctl", "--record", folder / "run", "--qmp", folder / "qmp")
    with ForkedServer(folder, image, *options) as running:
        yield running


def assert_works(server: ForkedServer) -> None:
    """A client is served, soon, and the control socket answers."""
    began = time.monotonic()
    with server.client() as client:
        client.write(0, b"A" * 512)
        client.flush()
    assert "power on" in nbdproxy("ctl", server.socket.parent / "ctl", "status").stdout
    assert time.monotonic() - began < SOON_S


def assert_ends(server: ForkedServer) -> None:
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.log
    assert time.monotonic() - began < SOON_S
    assert "Traceback" not in server.log


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE_S)
    sock.connect(str(path))
    return sock


def test_no_line_of_a_monitor_or_at_the_control_socket_ends_the_serving(
    server: ForkedServer, monitor: socket.socket
) -> None:
    for name, line in LINES.items():
        with monitor.accept()[0] as qemu, connect(server.socket.parent / "ctl") as control:
            with suppress(BrokenPipeError):
                qemu.sendall(line)
            with suppress(BrokenPipeError):
                control.sendall(line)
            answer = json.loads(control.makefile("rb").readline())
            assert answer["ok"] or "error" in answer, name
            with server.client() as client:
                client.flush()
    assert_works(server)
    assert_ends(server)


def test_a_line_of_the_control_socket_has_an_end(server: ForkedServer) -> None:
    with connect(server.socket.parent / "ctl") as control:
        with suppress(BrokenPipeError, ConnectionResetError):
            control.sendall(b"x" * (8 << 20))
        with suppress(ConnectionResetError):
            assert "not a command" in control.makefile("r").read()
    assert_works(server)
    assert_ends(server)


def test_a_policy_that_cannot_be_read_to_its_end_holds_up_nobody(
    server: ForkedServer, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    asked = json.dumps({"do": "policy", "names": [str(tmp_path / "fifo.toml")]})
    with connect(tmp_path / "ctl") as control:
        control.sendall(asked.encode() + b"\n")
        assert_works(server)
        assert_ends(server)


def flood(sock: socket.socket, data: bytes, ended: threading.Event) -> None:
    with suppress(OSError):
        while not ended.is_set():
            sock.sendall(data)


FLOODS = {
    "events": b'{"event": "RTC_CHANGE"}\n' * 1000,
    "objects": b"{}\n" * 20_000,
    "nothing": b"\n" * 65536,
    "no line": b"x" * 65536,
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS)
def test_a_monitor_that_never_stops_sending_holds_up_nobody(
    server: ForkedServer, monitor: socket.socket, data: bytes
) -> None:
    ended = threading.Event()
    with ExitStack() as stack:
        qemu = stack.enter_context(monitor.accept()[0])
        thread = threading.Thread(target=flood, args=(qemu, data, ended), daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        assert_works(server)
        assert_works(server)
        assert_ends(server)


def test_events_of_a_burst_all_arrive_in_their_order(
    server: ForkedServer, monitor: socket.socket, tmp_path: Path
) -> None:
    """More than one turn takes, and nothing behind them that would bring the next turn."""
    count = 2500
    with monitor.accept()[0] as qemu:
        qemu.sendall(b"".join(b'{"event": "E%d"}\n' % number for number in range(count)))
        control = tmp_path / "ctl"
        until(lambda: events(control) >= count, "all are in the recording")
        assert_ends(server)
    told = nbdproxy("log", tmp_path / "run", "--type", "qmp", "--json").stdout.splitlines()
    names = [json.loads(json.loads(line)["text"])["event"] for line in told]
    assert names == [f"E{number}" for number in range(count)]


def test_what_a_flush_left_for_another_turn_is_read_though_nothing_more_comes(
    monitor: socket.socket, tmp_path: Path
) -> None:
    """The listener waits for bytes, and it was a flush that read them."""
    seen: list[str] = []

    async def main() -> None:
        listener = QmpListener(tmp_path / "qmp", lambda event, _text: seen.append(event))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.run)
            with trio.fail_after(DEADLINE_S):
                while not listener.connected:
                    await trio.sleep(0.01)
                await trio.testing.wait_all_tasks_blocked(0.05)
                with monitor.accept()[0] as qemu:
                    qemu.sendall(b'{"event": "E"}\n' * 2500)
                    assert listener.poll()
                    assert len(seen) == 1000
                    while len(seen) < 2500:
                        await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)


def events(control: Path) -> int:
    told = json.loads(nbdproxy("ctl", control, "status", "--json").stdout)
    count = told["exports"][0]["events"]
    assert isinstance(count, int)
    return count


def test_all_that_had_come_before_a_flush_is_noted_before_it(
    server: ForkedServer, monitor: socket.socket, tmp_path: Path
) -> None:
    with monitor.accept()[0] as qemu, server.client() as client:
        qemu.sendall(b'{"timestamp": {}}\n' * 900 + b'{"event": "SHUTDOWN"}\n')
        client.flush()
        client.disc()
    assert_ends(server)
    told = nbdproxy("log", tmp_path / "run", "--type", "qmp,flush", "--json").stdout.splitlines()
    assert [json.loads(line)["type"] for line in told][:2] == ["qmp", "flush"]


def many(
    path: Path, count: int, stack: ExitStack, connect: Callable[[Path], socket.socket] = connect
) -> list[socket.socket]:
    return [stack.enter_context(connect(path)) for _ in range(count)]


@pytest.mark.parametrize("sent", [b"", b'{"do": ', b'{"do": "status"}\n'])
def test_idle_connections_keep_nobody_from_the_control_socket(
    server: ForkedServer, tmp_path: Path, sent: bytes
) -> None:
    with ExitStack() as stack:
        for one in many(tmp_path / "ctl", 100, stack):
            with suppress(BrokenPipeError):
                one.sendall(sent)
        assert_works(server)
        assert_ends(server)


def test_who_has_been_idle_the_longest_goes(server: ForkedServer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second, *_ = idle = many(tmp_path / "ctl", 16, stack)
        for one in (*idle, first):  # each is served: all are there, and the first is the freshest
            one.sendall(b'{"do": "status"}\n')
            assert one.recv(65536)
        (newest,) = many(tmp_path / "ctl", 1, stack)
        newest.sendall(b'{"do": "status"}\n')
        assert newest.recv(65536)
        assert second.recv(1) == b""
        first.sendall(b'{"do": "status"}\n')
        assert first.recv(65536)


def test_control_and_clients_leave_each_other_descriptors(image: Path, tmp_path: Path) -> None:
    """With 80 of them, of which the process itself needs some."""
    path, few = tmp_path / "socket", ("prlimit", "--nofile=80", *COMMAND)
    options = ("--socket", path, "--control", tmp_path / "ctl")
    with Server(image, *options, command=few), ExitStack() as stack:
        clients = []
        with suppress(OSError):
            for _ in range(80):
                clients.append(NbdClient.at(path))  # each has opened the export
        assert 5 < len(clients) < 80
        with ExitStack() as at_once:
            places = many(tmp_path / "ctl", 16, at_once)
            for place in (*places, *places):  # none of them has to go for another
                place.sendall(b'{"do": "status"}\n')
                assert place.recv(65536)
        many(tmp_path / "ctl", 80, stack)
        for _ in range(3):
            assert "power on" in nbdproxy("ctl", tmp_path / "ctl", "status").stdout
        clients.pop().drop()
        with suppress(OSError):
            clients.append(NbdClient.at(path))
        clients[-1].write(0, b"A" * 512)
        for one in clients:
            one.drop()

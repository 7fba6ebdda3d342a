"""Clients that are slow, silent, rude or gone, and signals: nobody waits for them for long.

Not covered: malformed requests, which are the protocol core's tests.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nbd_client import EINVAL, FUA, READ, WRITE, NbdClient, Op, connect_socket
from tests.support.serving import Server, nbdproxy, until

SIZE = 4 << 20
SOON_S = 3.0
"""Far below the server's own grace of 5 s and the negotiation's 10 s; ends take 0.1 s."""

IMPATIENT = (
    sys.executable,
    "-c",
    "import nbdproxy.server.front.session as s; s.NEGOTIATION_S = 0.3\n"
    "from nbdproxy.cli.app import main; main()",
)
"""The command, with less patience for clients that do not open an export."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[Server]:
    with Server(image, "--record", tmp_path / "run") as running:
        yield running


def fill_with_replies(server: Server) -> NbdClient:
    """A client that asks for 64 MiB and reads nothing of it."""
    client = server.client()
    client.send(*[Op(READ, 0, 1 << 20) for _ in range(64)])
    return client


def assert_works(server: Server) -> None:
    """Another client is served at once."""
    with server.client() as client:
        client.write(0, b"A" * 512)
        client.flush()
        assert client.read(0, 512) == b"A" * 512


def test_a_client_that_reads_no_replies_does_not_stop_others(server: Server) -> None:
    slow = fill_with_replies(server)
    for _ in range(5):
        assert_works(server)
    assert len(slow.collect(list(slow.waiting))) == 64
    slow.disc()
    assert server.stop() == 0


def test_a_client_that_reads_no_replies_does_not_stop_the_end(server: Server) -> None:
    slow = fill_with_replies(server)
    assert_works(server)
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 5 + SOON_S
    slow.drop()


def test_half_a_request_does_not_stop_others(server: Server) -> None:
    half = server.client()
    _, data = half.pack(Op(WRITE, 0, data=b"B" * 4096))
    half.sock.sendall(data[:1000])
    assert_works(server)
    half.sock.sendall(data[1000:])
    assert half.receive()[1].error == 0
    half.disc()
    assert server.stop() == 0


def test_a_client_that_never_opens_an_export_is_dropped(image: Path) -> None:
    with Server(image, command=IMPATIENT) as server:
        silent, _ = connect_socket(server.uri)
        assert silent.recv(18).startswith(b"NBDMAGIC")
        assert silent.recv(1) == b""
        talking = server.client()
        dribbling, _ = connect_socket(server.uri)
        dribbling.sendall(b"\0\0\0")
        dribbling.recv(18)
        assert dribbling.recv(1) == b""
        # One that has opened it may be silent as long as it likes.
        talking.write(0, b"A" * 512)
        talking.disc()
        assert server.stop() == 0
        silent.close()
        dribbling.close()


def test_idle_and_silent_clients_do_not_hold_up_the_end(server: Server) -> None:
    idle = [server.client() for _ in range(20)]
    silent = [connect_socket(server.uri)[0] for _ in range(5)]
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < SOON_S
    for client in idle:
        assert client.sock.recv(1) == b""
        client.drop()
    for sock in silent:
        sock.close()


def test_many_connections_come_and_go(server: Server) -> None:
    for turn in range(100):
        client = server.client()
        if turn % 3 == 0:
            client.drop()
        elif turn % 3 == 1:
            client.send(Op(WRITE, 0, data=b"B" * 4096, flags=FUA))
            client.drop()
        else:
            client.disc()
    assert_works(server)
    assert server.stop() == 0


def test_disc_completes_what_is_in_flight(server: Server, image: Path) -> None:
    client = server.client()
    cookies = client.send(*[Op(WRITE, n * 512, data=b"C" * 512, flags=FUA) for n in range(50)])
    client.sock.sendall(client.pack(Op(2))[1])
    replies = client.collect(cookies)
    assert not any(reply.error for reply in replies.values())
    client.drop()
    assert server.stop() == 0
    assert image.read_bytes()[: 50 * 512] == b"C" * 512 * 50


def test_garbage_drops_the_client_and_nobody_else(server: Server) -> None:
    rude = server.client()
    rude.sock.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert rude.sock.recv(1) == b""
    rude.drop()
    assert_works(server)
    assert server.stop() == 0
    assert "broke the protocol" in server.stderr


def test_a_refused_request_leaves_the_stream_in_step(server: Server) -> None:
    with server.client() as client:
        replies = client.do(
            Op(READ, 0, 0),
            Op(WRITE, SIZE - 512, data=b"D" * 1024),
            Op(99, 0, 512),
            Op(WRITE, 512, data=b"E" * 512),
            Op(READ, 512, 512),
        )
        assert replies[0].error == EINVAL
        assert replies[1].error != 0
        assert replies[2].error == EINVAL
        assert replies[3].error == 0
        assert replies[4].data == b"E" * 512
    assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_recording_in_order(
    server: Server, tmp_path: Path, number: signal.Signals
) -> None:
    assert_works(server)
    server.signal(number)
    assert server.wait() == 0
    told = nbdproxy("info", tmp_path / "run").stdout
    assert f"ended by {number.name}" in told
    assert "missing" not in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(image: Path, number: signal.Signals) -> None:
    """Here the first one has to wait for a command that does not want to end."""
    stubborn = 'trap "" TERM; echo "$uri"; sleep 8'
    with Server(image, "--run", stubborn) as server:
        server.signal(number)
        # The first one has been seen when nobody is let in any more.
        until(lambda: _is_closed(server), "the server is ending")
        started = time.monotonic()
        server.signal(number)
        assert server.wait() == 128 + number
        assert time.monotonic() - started < SOON_S


def _is_closed(server: Server) -> bool:
    try:
        connect_socket(server.uri)[0].close()
    except OSError:
        return True
    return False

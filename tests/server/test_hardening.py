"""Clients that idle, stall, crowd in or vanish: the door and the session stand them all.

What one client can make the server hold or do is in `test_floods.py`, TLS in `test_tls.py`. Not
covered: attacks from several machines, and what the kernel itself drops.
"""

from __future__ import annotations

import itertools
import json
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdproxy.disks.file import FileDisk
from nbdproxy.nbd.constants import TlsMode
from nbdproxy.policy import loader
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.export_provider import FixedExports
from nbdproxy.server.front.session import Session
from nbdproxy.server.shared.power import Power
from nbdproxy.server.shared.tls import server_tls
from tests.support import raw_client as raw
from tests.support.certificates import Certificates
from tests.support.lower import nbdkit
from tests.support.nbd_client import DISC, FLUSH, FUA, READ, WRITE, Op, connect_socket
from tests.support.proxies import MIB, Proxy
from tests.support.serving import nbdproxy, tool, until

SOON_S = 2.0
"""On a busy machine 0.1 s may become this; the server's own limits are 5 s and more."""

PLACES = 100
GO = raw.option(raw.GO, raw.name_and_infos("", 3))
HALVES = (None, b"", struct.pack(">I", 3), struct.pack(">I", 3) + GO[:9], b"\0\0\0\3" + GO[:-1])
"""How far a client comes that never opens an export: not even reading, reading, flags, ..."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * MIB)
    return path


@pytest.fixture
def proxy(image: Path, tmp_path: Path) -> Iterator[Proxy]:
    with Proxy(tmp_path / "proxy", image, "--record", tmp_path / "run") as running:
        yield running


def assert_works(proxy: Proxy) -> None:
    """A real client is served, soon."""
    started = time.monotonic()
    with proxy.client() as client:
        client.write(0, b"A" * 512)
        client.flush()
        assert client.read(0, 512) == b"A" * 512
    assert time.monotonic() - started < SOON_S


def half_open(proxy: Proxy, count: int) -> list[socket.socket]:
    """Connect that many clients that stop somewhere in the negotiation."""
    clients = []
    for sent in itertools.islice(itertools.cycle(HALVES), count):
        sock, _ = connect_socket(proxy.uri)
        if sent is not None:
            assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
            sock.sendall(sent)
        clients.append(sock)
    return clients


def refusals(run: Path) -> list[str]:
    """What the recording says of clients that were turned away."""
    told = nbdproxy("log", run, "--type", "refused", "--json").stdout
    return [json.loads(line)["text"] for line in told.splitlines()]


def test_half_open_clients_keep_no_real_one_out_and_the_end_not_waiting(proxy: Proxy) -> None:
    """CVE-2019-14850 and CVE-2024-7409."""
    idle = half_open(proxy, 2 * PLACES)
    for _ in range(3):
        assert_works(proxy)
    assert tool("nbdinfo", "--size", proxy.uri) == f"{MIB}\n"
    started = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - started < SOON_S
    for sock in idle:
        sock.close()


def test_the_newest_half_open_clients_keep_their_places(proxy: Proxy) -> None:
    """It is the one that has been at the door the longest who goes."""
    first, *others, last = half_open(proxy, PLACES + 1)
    first.settimeout(SOON_S)  # before its time for the negotiation is over
    assert first.recv(64).startswith(b"NBDMAGIC")
    assert first.recv(64) == b""
    assert last.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
    last.sendall(struct.pack(">I", 3) + GO)
    assert last.recv(8, socket.MSG_WAITALL) == bytes.fromhex("0003e889045565a9")
    for sock in (first, *others, last):
        sock.close()


def test_client_101_is_turned_away_and_places_come_free_again(proxy: Proxy, tmp_path: Path) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(PLACES)]
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                proxy.client()
        clients[17].disc()
        clients[3].drop()
        until(lambda: _admits(proxy), "the place of who vanished is free")
        for client in clients[50:60]:
            assert client.read(0, 512) == b"-" * 512
    until(lambda: _admits(proxy), "all places are free")
    assert proxy.stop() == 0
    assert "all 100 places are taken" in refusals(tmp_path / "run")[0]
    # One note a second at most: a flood must not fill the recording.
    assert len(refusals(tmp_path / "run")) <= 10


def _admits(proxy: Proxy) -> bool:
    try:
        with proxy.client(), proxy.client():
            return True
    except ConnectionResetError:
        return False


def test_who_is_still_at_the_door_makes_room(proxy: Proxy) -> None:
    """99 at work and one idle: somebody new gets the place of the idle one."""
    with ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(PLACES - 1)]
        (idle,) = half_open(proxy, 1)
        assert_works(proxy)
        idle.settimeout(SOON_S)
        assert idle.recv(64).startswith(b"NBDMAGIC")
        assert idle.recv(64) == b""
        assert clients[0].read(0, 512) == b"A" * 512
        idle.close()


def test_a_client_may_send_one_byte_at_a_time(proxy: Proxy, image: Path) -> None:
    sock, _ = connect_socket(proxy.uri)
    stream = b"".join(
        (
            struct.pack(">I", 3),
            raw.option(raw.LIST),
            GO,
            raw.request(WRITE, 512, 512, cookie=1) + b"B" * 512,
            raw.request(READ, 0, 1024, cookie=2),
            raw.request(FLUSH, 0, 0, cookie=3),
            raw.request(DISC, 0, 0),
        )
    )
    for at in range(len(stream)):
        sock.sendall(stream[at : at + 1])
    said = b""
    while part := sock.recv(1 << 16):
        said += part
    sock.close()
    ok = struct.pack(">II", 0x67446698, 0)
    assert b"-" * 512 + b"B" * 512 in said
    assert [said.count(ok + cookie.to_bytes(8)) for cookie in (1, 2, 3)] == [1, 1, 1]
    assert proxy.stop() == 0
    assert image.read_bytes()[:1024] == b"-" * 512 + b"B" * 512


def work(size: int) -> list[Op]:
    """Requests that wait, at least for a disk to be synced."""
    ops = [Op(WRITE, n * 4096 % size, data=b"C" * 4096, flags=FUA) for n in range(40)]
    return [*ops, *(Op(READ, n * 4096 % size, 4096) for n in range(20)), Op(FLUSH)]


def test_disc_completes_what_another_server_has_in_flight(image: Path, tmp_path: Path) -> None:
    """DISC goes out with the requests, and every one of them takes a while below."""
    delays = ("--filter=delay", "file", image, "delay-read=400ms", "delay-write=400ms")
    with nbdkit(tmp_path, *delays) as below, Proxy(tmp_path / "proxy", below.uri) as proxy:
        client = proxy.client()
        packed = [client.pack(op) for op in work(MIB)[20:]]
        client.sock.sendall(b"".join(data for _, data in packed) + client.pack(Op(DISC))[1])
        replies = client.collect(cookie for cookie, _ in packed)
        assert [reply.error for reply in replies.values()] == [0] * len(packed)
        assert client.sock.recv(1) == b""
        client.drop()
        assert proxy.stop() == 0


@pytest.mark.parametrize("below", ["file", "server"])
def test_who_vanishes_with_work_in_flight_leaves_nothing_behind(
    image: Path, tmp_path: Path, below: str
) -> None:
    delays = ("--filter=delay", "file", image, "delay-read=20ms", "delay-write=20ms")
    with ExitStack() as stack:
        where = stack.enter_context(nbdkit(tmp_path, *delays)).uri if below == "server" else image
        proxy = stack.enter_context(Proxy(tmp_path / "proxy", where, "--record", tmp_path / "run"))
        assert_works(proxy)
        before = proxy.descriptors
        for _ in range(10):
            client = proxy.client()
            client.send(*work(MIB))
            client.sock.sendall(client.pack(Op(WRITE, 0, data=b"D" * 4096))[1][:-1])
            client.drop()
        assert_works(proxy)
        until(lambda: proxy.descriptors <= before, "all descriptors are closed")
        assert proxy.stop() == 0
        assert "Traceback" not in proxy.stderr
    assert "missing" not in nbdproxy("info", tmp_path / "run", "--verify").stdout


async def _say_nothing(sock: trio.socket.SocketType) -> None:
    await sock.recv(64)
    await trio.sleep_forever()


async def _dribble(sock: trio.socket.SocketType) -> None:
    """Send one more byte of a long option every second."""
    await sock.send(struct.pack(">I8sII", 3, b"IHAVEOPT", raw.GO, 60000))
    while True:
        await trio.sleep(0.9)
        await sock.send(b"x")


async def _list_and_list(sock: trio.socket.SocketType) -> None:
    await sock.send(struct.pack(">I", 3))
    while True:
        await sock.send(raw.option(raw.LIST))
        await trio.sleep(0.9)


async def _stop_in_the_tls_handshake(sock: trio.socket.SocketType) -> None:
    await sock.send(struct.pack(">I", 3) + raw.option(raw.STARTTLS))
    await trio.sleep(1)
    await sock.send(b"\x16\x03\x01\x02\x00\x01")
    await trio.sleep_forever()


async def _open_the_export(sock: trio.socket.SocketType) -> None:
    await trio.sleep(9)
    await sock.send(struct.pack(">I", 3) + GO)
    await trio.sleep_forever()


Script = Callable[[trio.socket.SocketType], Awaitable[None]]
SCRIPTS: list[tuple[Script, float]] = [
    *((script, 10) for script in (_say_nothing, _dribble, _list_and_list)),
    (_stop_in_the_tls_handshake, 10),
    (_open_the_export, 3600),
]


@pytest.mark.parametrize(("script", "expected_s"), SCRIPTS)
def test_a_client_has_ten_seconds_to_open_an_export_and_then_all_day(
    image: Path, certificates: Certificates, script: Script, expected_s: float
) -> None:
    """The clock is a mock one that jumps when everybody waits, so the seconds take none."""
    tls = server_tls(TlsMode.ALLOW, certificates.good, verify_peer=False)
    disk = FileDisk(image)
    export = Export("", ImageStore(disk), loader.load("passthrough").policy)

    async def play(sock: socket.socket) -> None:
        with suppress(OSError):
            await script(trio.socket.from_stdlib_socket(sock))

    async def main() -> float:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        session = Session(ours, 1, "test", FixedExports([export]), power=Power(), tls=tls)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(play, theirs)
            with trio.move_on_after(3600):
                await session.run()
            took = trio.current_time()
            nursery.cancel_scope.cancel()
        theirs.close()
        return took

    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(main, clock=clock) == pytest.approx(expected_s, abs=1e-6)
    disk.close()

"""One client that asks for far too much: the server's memory stays bounded, others stay served.

Memory is the kernel's VmHWM, so a peak is seen even if it is over. Latencies are those of a second
client that works meanwhile. Not covered: many flooding clients at once, and how fast a flood is.
"""

from __future__ import annotations

import select
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import raw_client as raw
from tests.support.lower import nbdkit
from tests.support.nbd_client import FUA, READ, WRITE, NbdClient, Op
from tests.support.proxies import MIB, Proxy
from tests.support.raw_client import BLOCK_STATUS, RawClient
from tests.support.serving import DEADLINE_S, until

SIZE = 64 * MIB
LONGEST = 32 * MIB
REQUESTS = 30_000
BOUND = 200 * MIB
"""Three of the largest requests in the works, a megabyte of buffers, and room to spare."""

SOON_S = 3.0
TYPICAL_S = 0.5
"""The worst and the typical latency; on a machine of its own they are 0.1 s and 1 ms."""

FLOODS: dict[str, Callable[[], list[bytes]]] = {
    "reads": lambda: [raw.request(READ, 0, LONGEST) * REQUESTS],
    "statuses": lambda: [raw.request(BLOCK_STATUS, 0, SIZE) * REQUESTS],
    "refused": lambda: [raw.request(READ, SIZE, 512) * REQUESTS],
    "large writes": lambda: [raw.request(WRITE, 0, LONGEST) + bytes(LONGEST)] * 6,
    "small writes": lambda: [
        raw.request(WRITE, n % 256 * 65536, 65536, flags=n % 2 * FUA) + bytes(65536)
        for n in range(2000)
    ],
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Every other block is a hole, so that there is much to tell of it."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        for at in range(0, 8 * MIB, 8192):
            file.seek(at)
            file.write(b"-" * 4096)
        file.truncate(SIZE)
    return path


@pytest.fixture
def proxy(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy above a file, recorded or not, and above a server, which is always waited for."""
    above = getattr(request, "param", "file")
    record = ("--record", tmp_path / "run") if above == "recorded" else ()
    with ExitStack() as stack:
        below = stack.enter_context(nbdkit(tmp_path, "file", image)) if above == "server" else None
        what = image if below is None else below.uri
        yield stack.enter_context(Proxy(tmp_path / "proxy", what, *record))


@contextmanager
def flood(sock: socket.socket, data: Sequence[bytes]) -> Iterator[None]:
    """Send all of `data` beside, as far as the server takes it; nothing is read.

    The block begins when the server has either taken all or begun to answer.
    """

    def send() -> None:
        with suppress(OSError):
            for part in data:
                sock.sendall(part)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        until(lambda: not thread.is_alive() or is_readable(sock), "the flood has begun")
        yield
    finally:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)
        sock.close()
        assert not thread.is_alive()


def is_readable(sock: socket.socket) -> bool:
    """Whether there is something to read."""
    return bool(select.select([sock], [], [], 0)[0])


def opened(proxy: Proxy) -> socket.socket:
    """A client in transmission, with structured replies and contexts."""
    client = RawClient(proxy.uri)
    client.open_structured("base:allocation")
    return client.sock


def assert_served(proxy: Proxy, count: int = 40) -> None:
    """Work as a second client, which must not wait for long."""
    took = []
    with proxy.client() as client:
        for turn in range(count):
            started = time.monotonic()
            data = turn.to_bytes(4) * 1024
            client.write(SIZE - 8192, data)
            assert client.read(SIZE - 8192, 4096) == data
            took.append(time.monotonic() - started)
    assert max(took) < SOON_S
    assert statistics.median(took) < TYPICAL_S or count < 5


CASES = [
    *(("file", kind) for kind in ("reads", "statuses", "refused", "large writes")),
    *(("recorded", kind) for kind in ("large writes", "small writes")),
    *(("server", kind) for kind in ("reads", "statuses", "large writes", "small writes")),
]


@pytest.mark.parametrize(("proxy", "kind"), CASES, indirect=["proxy"])
def test_a_client_that_reads_nothing_costs_no_more_than_a_few_requests(
    proxy: Proxy, kind: str
) -> None:
    assert_served(proxy, 2)
    before = proxy.peak
    with flood(opened(proxy), FLOODS[kind]()):
        assert_served(proxy)
        assert proxy.peak - before < BOUND
    assert_served(proxy, 2)
    assert proxy.stop() == 0


@pytest.mark.parametrize("proxy", ["file", "server"], indirect=True)
def test_a_client_that_reads_slowly_costs_no_more_the_longer_it_takes(proxy: Proxy) -> None:
    assert_served(proxy, 2)
    sock = opened(proxy)
    with flood(sock, FLOODS["reads"]()):
        buffer, got = bytearray(4 * MIB), 0
        while got < 8 * MIB:
            got += sock.recv_into(buffer)
        before = proxy.peak
        while got < 48 * MIB:
            got += sock.recv_into(buffer)
        assert proxy.peak - before < LONGEST
    assert proxy.stop() == 0


GARBAGE = {
    "noise": [raw.garbage(1, MIB)],
    "a giant write": [raw.request(WRITE, 0, 0xFFFFFFFF), bytes(MIB)],
    "unknown commands": [b"".join(raw.request(n, 0, 512) for n in range(8, 20_000))],
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_costs_nothing(proxy: Proxy, kind: str) -> None:
    assert_served(proxy, 2)
    before = proxy.peak
    for _ in range(5):
        with flood(opened(proxy), GARBAGE[kind]):
            assert_served(proxy, 5)
    assert proxy.peak - before < 32 * MIB
    assert proxy.stop() == 0


@pytest.mark.parametrize(
    ("proxy", "command"),
    [("file", READ), ("recorded", WRITE), ("server", READ), ("server", WRITE)],
    indirect=["proxy"],
)
def test_a_client_that_is_always_busy_starves_nobody(proxy: Proxy, command: int) -> None:
    """It has 16 requests of 1 MiB in flight, and sends a new one for each reply."""
    stop = threading.Event()
    done: list[int] = []
    busy = proxy.client()

    def keep_busy() -> None:
        op = Op(command, 0, MIB, bytes(MIB) if command == WRITE else b"")
        sent = busy.send(*[op] * 16)
        while not stop.is_set():
            busy.receive()
            sent += busy.send(op)
        done.extend(reply.error for reply in busy.collect(busy.waiting).values())

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        assert_served(proxy, 30)
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert len(done) == 16
    assert not any(done)
    busy.disc()
    assert proxy.stop() == 0


def test_a_stream_of_small_requests_that_never_ends_starves_nobody(proxy: Proxy) -> None:
    """There is always more to read, and all replies are taken: the server never has to wait."""
    stop = threading.Event()
    sock = NbdClient(proxy.uri).sock
    requests = (raw.request(WRITE, 0, 512) + bytes(512)) * 8000

    def send() -> None:
        while not stop.is_set():
            sock.sendall(requests)
        sock.shutdown(socket.SHUT_WR)

    def take() -> None:
        buffer = bytearray(MIB)
        while sock.recv_into(buffer):
            pass

    threads = [threading.Thread(target=work) for work in (send, take)]
    for thread in threads:
        thread.start()
    try:
        assert_served(proxy, 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    sock.close()
    assert proxy.stop() == 0

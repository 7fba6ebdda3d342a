"""How it ends above another server: killed, stopped, hung, or in a chain of proxies.

Clients get EIO for what is in flight, nbdproxy ends with one sentence and exit code 2, and the
recording can be read. Not covered: servers that are lost behind a network that drops packets, where
only TCP's own patience ends a wait.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.images import write_sparse
from tests.support.lower import KINDS, nbdkit
from tests.support.nbd_client import FLUSH, FUA, READ, WRITE, NbdClient, Op
from tests.support.proxies import MIB, Proxy
from tests.support.recordings import requests, state
from tests.support.serving import Server, nbdproxy, tool, until

EIO, ESHUTDOWN = 5, 108
SOON_S = 3.0
SLOW = ("--filter=delay", "delay-read=60", "delay-write=60")
"""What goes through this filter is in flight for as long as a test may take."""

IN_FLIGHT = [
    *(Op(READ, n * 4096, 4096) for n in range(8)),
    *(Op(WRITE, n * 512, data=b"A" * 512, flags=n % 2 * FUA) for n in range(8)),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in the first half, a hole behind it."""
    return write_sparse(tmp_path / "image", random.Random(1).randbytes(MIB) + bytes(MIB))


def errors(client: NbdClient, cookies: list[int]) -> set[int]:
    """The error numbers with which these requests are answered."""
    return {reply.error for reply in client.collect(cookies).values()}


def assert_lost(proxy: Proxy, uri: str) -> None:
    """It ends by itself, and says what the matter was."""
    assert proxy.wait() == 2
    assert proxy.sentence.startswith(f"the NBD server of {uri} is lost: ")
    assert proxy.sentence.endswith("; start it again")


def test_requests_in_flight_fail_with_eio_when_the_server_is_killed(tmp_path: Path) -> None:
    options = ("--record", tmp_path / "run")
    with (
        nbdkit(tmp_path, SLOW[0], "memory", "1M", *SLOW[1:]) as below,
        Proxy(tmp_path / "proxy", below.uri, *options) as proxy,
    ):
        clients = [proxy.client(), proxy.client()]
        sent = [client.send(*IN_FLIGHT) for client in clients]
        until(lambda: len(requests(tmp_path / "run")) == 16, "all is in flight")
        below.kill()
        for client, cookies in zip(clients, sent, strict=True):
            assert errors(client, cookies) == {EIO}
        assert_lost(proxy, below.uri)
        for client in clients:
            client.drop()
    told = requests(tmp_path / "run")
    assert [(one[0], one[-1]) for one in told] == [("write", "EIO")] * 16
    assert "is lost" in nbdproxy("info", tmp_path / "run", "--verify").stdout


def test_a_write_that_waits_for_its_before_image_fails_with_eio(
    image: Path, tmp_path: Path
) -> None:
    """Nothing is lost unsaved: the write has not gone down, and the image is as it was."""
    before = image.read_bytes()
    with (
        nbdkit(tmp_path, SLOW[0], "file", image, SLOW[1]) as below,
        Proxy(tmp_path / "proxy", below.uri, "--record", tmp_path / "run") as proxy,
    ):
        client = proxy.client()
        cookies = client.send(Op(WRITE, 0, data=b"A" * 4096))
        with proxy.client() as other:
            other.flush()
        below.kill()
        assert errors(client, cookies) == {EIO}
        assert_lost(proxy, below.uri)
        client.drop()
    assert image.read_bytes() == before


def test_a_flush_that_lands_what_is_held_is_never_answered_with_success(tmp_path: Path) -> None:
    """The end is a power cut under this policy, so that EIO and a hang-up are both true."""
    options = ("--policy", "drop-unflushed", "--record", tmp_path / "run")
    with (
        nbdkit(tmp_path, SLOW[0], "memory", "1M", SLOW[2]) as below,
        Proxy(tmp_path / "proxy", below.uri, *options) as proxy,
    ):
        client = proxy.client()
        client.write(0, b"A" * 4096)
        client.send(Op(FLUSH), Op(WRITE, 512, data=b"B" * 512, flags=FUA))
        until(lambda: len(requests(tmp_path / "run")) == 3, "the flush is in flight")
        below.kill()
        with suppress(ConnectionError):
            for _ in range(2):
                assert client.receive()[1].error == EIO
        assert_lost(proxy, below.uri)
        client.drop()
    lines = nbdproxy("log", tmp_path / "run", "--type", "write,flush", "--json").stdout
    told = [json.loads(line) for line in lines.splitlines()]
    assert [one["type"] for one in told] == ["write", "flush", "write"]
    assert all(one["error"] == "EIO" or one["completed"] is None for one in told[1:])


def test_a_server_that_says_it_is_stopping_is_lost(image: Path, tmp_path: Path) -> None:
    """nbdkit stays for the clients that it has, and answers them with ESHUTDOWN."""
    with nbdkit(tmp_path, "file", image) as below, Proxy(tmp_path / "proxy", below.uri) as proxy:
        client = proxy.client()
        below.process.send_signal(signal.SIGTERM)
        said = 0

        def has_failed() -> bool:
            nonlocal said
            said = client.do(Op(READ, 0, 512))[0].error
            return said != 0

        until(has_failed, "it has seen the signal")
        assert said in {EIO, ESHUTDOWN}
        assert_lost(proxy, below.uri)
        client.drop()


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("nbdkit", signal.SIGKILL),
        *(("qemu-nbd", number) for number in (signal.SIGTERM, signal.SIGKILL)),
        *(("storage-daemon", number) for number in (signal.SIGTERM, signal.SIGKILL)),
    ],
)
def test_an_idle_proxy_ends_with_its_server(
    image: Path, tmp_path: Path, kind: str, number: signal.Signals
) -> None:
    with (
        KINDS[kind](tmp_path, image) as below,
        Proxy(tmp_path / "proxy", below.uri, "--record", tmp_path / "run") as proxy,
    ):
        with proxy.client() as client:
            client.write(0, b"A" * 512)
        idle = proxy.client()
        below.process.send_signal(number)
        assert_lost(proxy, below.uri)
        idle.drop()
    assert image.read_bytes()[:512] == b"A" * 512
    assert "is lost" in nbdproxy("info", tmp_path / "run").stdout


def test_a_run_command_ends_with_the_server(image: Path, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "file", image) as below:
        command = f"kill -9 {below.process.pid}; exec sleep 60"
        started = time.monotonic()
        told = nbdproxy("serve", below.uri, "--run", command, code=2).stderr
        assert "is lost" in told
        assert time.monotonic() - started < 30


HASTY = (
    sys.executable,
    "-c",
    "import sys, nbdproxy.server.assemble as a; a._END_S = 0.3\n"
    "from nbdproxy.cli.app import main; sys.argv[2] = sys.argv.pop(); main()",
)
"""The command, with less patience at the end; the last argument takes the place of the image."""


def test_a_hung_server_is_given_up_at_the_end(image: Path, tmp_path: Path) -> None:
    """What it was sent may not be durable, and that is said."""
    options = ("--record", tmp_path / "run")
    with (
        nbdkit(tmp_path, "file", image) as below,
        Server(image, *options, below.uri, command=HASTY) as server,
    ):
        with server.client() as client:
            client.write(MIB, b"A" * 512)
        below.process.send_signal(signal.SIGSTOP)
        try:
            server.signal(signal.SIGTERM)
            assert server.wait(SOON_S) == 2
        finally:
            below.process.send_signal(signal.SIGCONT)
        assert "Traceback" not in server.stderr
        said = [line for line in server.stderr.splitlines() if line.startswith("nbdproxy: ")]
        assert len(said) == 1
        assert below.uri in said[0]
    assert [one[0] for one in requests(tmp_path / "run")] == ["write"]


def test_a_hung_server_does_not_hold_up_a_second_signal(image: Path, tmp_path: Path) -> None:
    """The first one waits for the flush that makes all durable."""
    with (
        nbdkit(tmp_path, "file", image) as below,
        Proxy(tmp_path / "proxy", below.uri) as proxy,
    ):
        with proxy.client() as client:
            client.write(0, b"A" * 512)
        below.process.send_signal(signal.SIGSTOP)
        try:
            proxy.signal(signal.SIGTERM)
            until(lambda: not proxy.socket.exists(), "it is ending")
            assert not proxy.ended
            proxy.signal(signal.SIGTERM)
            assert proxy.wait(SOON_S) in {128 + signal.SIGTERM, -signal.SIGTERM}
        finally:
            below.process.send_signal(signal.SIGCONT)


def test_a_chain_of_two_is_one_disk(image: Path, tmp_path: Path) -> None:
    """Byte by byte, holes and all; and both recordings say the same."""
    source, back, runs = tmp_path / "source", tmp_path / "back", [tmp_path / "r1", tmp_path / "r2"]
    source.write_bytes(bytes(65536) + random.Random(2).randbytes(MIB) + bytes(MIB - 65536))
    with (
        nbdkit(tmp_path, "file", image) as below,
        Proxy(tmp_path / "p1", below.uri, "--record", runs[0]) as lower,
        Proxy(tmp_path / "p2", lower.uri, "--record", runs[1]) as upper,
    ):
        tool("nbdcopy", "--connections=4", upper.uri, back)
        assert back.read_bytes() == image.read_bytes()
        maps = [tool("nbdinfo", "--map", "--json", one.uri) for one in (below, lower, upper)]
        assert maps[0] == maps[1] == maps[2]
        tool("nbdcopy", "--connections=4", "--flush", source, upper.uri)
        assert upper.stop() == 0
        assert lower.stop() == 0
    assert image.read_bytes() == source.read_bytes()
    assert state(runs[0], image) == state(runs[1], image) == source.read_bytes()


def test_a_chain_ends_from_below(image: Path, tmp_path: Path) -> None:
    with (
        nbdkit(tmp_path, SLOW[0], "file", image, *SLOW[1:]) as below,
        Proxy(tmp_path / "p1", below.uri) as lower,
        Proxy(tmp_path / "p2", lower.uri) as upper,
    ):
        client = upper.client()
        cookies = client.send(*IN_FLIGHT)
        below.kill()
        assert errors(client, cookies) <= {EIO, ESHUTDOWN}
        assert_lost(lower, below.uri)
        assert_lost(upper, lower.uri)
        client.drop()


def test_an_orderly_end_below_is_the_end_above(image: Path, tmp_path: Path) -> None:
    with (
        Proxy(tmp_path / "p1", image) as lower,
        Proxy(tmp_path / "p2", lower.uri) as upper,
    ):
        client = upper.client()
        client.write(0, b"A" * 512)
        assert lower.stop() == 0
        assert_lost(upper, lower.uri)
        client.drop()
    assert image.read_bytes()[:512] == b"A" * 512


def test_a_power_cut_below_takes_what_no_flush_had_covered(image: Path, tmp_path: Path) -> None:
    """The upper proxy is the guest's host here, the lower one the disk that loses its cache."""
    before = image.read_bytes()
    with (
        Proxy(tmp_path / "p1", image, "--policy", "drop-unflushed") as lower,
        Proxy(tmp_path / "p2", lower.uri, "--record", tmp_path / "run") as upper,
    ):
        client = upper.client()
        client.write(0, b"A" * 512)
        client.flush()
        client.write(512, b"B" * 512)
        assert lower.stop() == 0
        assert_lost(upper, lower.uri)
        client.drop()
    assert image.read_bytes() == b"A" * 512 + before[512:]
    power_loss = ("--mode", "none", "--failure", "host-power-loss")
    assert state(tmp_path / "run", image, *power_loss) == image.read_bytes()

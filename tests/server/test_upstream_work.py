"""nbdproxy above another server at work: policies, overlays, order, many requests, TLS.

What goes through unchanged is in `test_upstream.py`. Not covered: policies themselves.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.support.certificates import Certificates
from tests.support.images import write_sparse
from tests.support.lower import nbdkit
from tests.support.nbd_client import FLUSH, FUA, READ, TRIM, WRITE, ZERO, Op
from tests.support.proxies import MIB, Proxy
from tests.support.raw_client import tls_uri
from tests.support.recordings import requests, state
from tests.support.scripted import Asked, Peer, Scripted
from tests.support.serving import nbdproxy, tool

EIO, ENOTSUP = 5, 95
FAST_ZERO = 16


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in the first half, a hole behind it."""
    return write_sparse(tmp_path / "image", random.Random(1).randbytes(MIB) + bytes(MIB))


def test_unflushed_writes_are_dropped_above_a_server(image: Path, tmp_path: Path) -> None:
    """The image below is, after the cut, the recording's worst state of a power loss."""
    before = image.read_bytes()
    options = ("--policy", "drop-unflushed", "--record", tmp_path / "run")
    with (
        nbdkit(tmp_path, "file", image) as below,
        Proxy(tmp_path / "proxy", below.uri, *options) as proxy,
    ):
        with proxy.client() as client:
            client.write(0, b"A" * 4096)
            client.zero(MIB // 2, 65536)
            client.flush()
            client.write(512, b"B" * 1024, FUA)
            client.write(4096, b"C" * 4096)
            client.trim(0, 65536)
            assert client.read(0, 65536) == bytes(65536)
        assert proxy.stop() == 0
    expected = bytearray(before)
    expected[:4096] = b"A" * 512 + b"B" * 1024 + b"A" * 2560
    expected[MIB // 2 : MIB // 2 + 65536] = bytes(65536)
    assert image.read_bytes() == expected
    assert (
        state(tmp_path / "run", image, "--mode", "none", "--failure", "host-power-loss") == expected
    )


@pytest.mark.parametrize("options", [(), ("--policy", "drop-unflushed"), ("--policy", "unsafe")])
def test_an_overlay_never_writes_the_server(
    image: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    before, lower = image.read_bytes(), tmp_path / "lower-run"
    with Proxy(tmp_path / "lower", image, "--record", lower) as below:
        with Proxy(tmp_path / "proxy", below.uri, "--overlay", *options) as proxy:
            with proxy.client() as client:
                client.write(0, b"A" * 4096, FUA)
                client.zero(8192, 512)
                client.trim(16384, 512)
                client.flush()
                assert client.read(0, 4096) == b"A" * 4096
            assert proxy.stop() == 0
        assert below.stop() == 0
    assert image.read_bytes() == before
    assert not [one for one in requests(lower) if one[0] != "flush"]


def test_a_write_goes_nowhere_while_what_it_replaces_cannot_be_read(
    image: Path, tmp_path: Path
) -> None:
    """The recording must have the before-image first; where nothing was, nothing is asked."""
    before, switch = image.read_bytes(), tmp_path / "on"
    options = ("error=EIO", f"error-file={switch}", "error-pread-rate=100%")
    with (
        nbdkit(tmp_path, "--filter=error", "file", image, *options) as below,
        Proxy(tmp_path / "proxy", below.uri, "--record", tmp_path / "run") as proxy,
    ):
        with proxy.client() as client:
            switch.touch()
            ops = [Op(WRITE, 4096, data=b"A" * 512), Op(TRIM, 8192, 512)]
            assert [reply.error for reply in client.do(*ops)] == [EIO, EIO]
            client.write(MIB, b"B" * 512)
            assert image.read_bytes() == before[:MIB] + b"B" * 512 + before[MIB + 512 :]
            switch.unlink()
            client.write(4096, b"C" * 512)
        assert proxy.stop() == 0
    after = before[:4096] + b"C" * 512 + before[4608:MIB] + b"B" * 512 + before[MIB + 512 :]
    assert image.read_bytes() == after
    nbdproxy("info", tmp_path / "run", "--verify")


DELAYS = ("delay-read=500ms", "delay-zero=500ms", "delay-trim=500ms")


def test_many_requests_are_in_flight_at_once(image: Path, tmp_path: Path) -> None:
    """Sixteen reads of half a second each, and two clients: about one delay, not 32."""
    with (
        nbdkit(tmp_path, "--filter=delay", "--threads=40", "file", image, DELAYS[0]) as below,
        Proxy(tmp_path / "proxy", below.uri) as proxy,
        proxy.client() as first,
        proxy.client() as second,
    ):
        started = time.monotonic()
        cookies = [
            client.send(*[Op(READ, n * 4096, 4096) for n in range(16)])
            for client in (first, second)
        ]
        for client, sent in zip((first, second), cookies, strict=True):
            assert not any(one.error for one in client.collect(sent).values())
        assert 0.5 <= time.monotonic() - started < 4


@pytest.mark.parametrize("slow", [ZERO, TRIM])
def test_changes_of_one_place_land_in_the_order_received(
    image: Path, tmp_path: Path, slow: int
) -> None:
    """Of two in flight the first takes long below; another place does not wait for it."""
    with (
        nbdkit(tmp_path, "--filter=delay", "file", image, *DELAYS) as below,
        Proxy(tmp_path / "proxy", below.uri) as proxy,
    ):
        with proxy.client() as client:
            waited = client.send(
                Op(slow, 0, 65536),
                Op(WRITE, 512, data=b"B" * 512),
                Op(WRITE, 0, data=b"C" * 4096),
            )
            (free,) = client.send(Op(WRITE, MIB, data=b"D" * 512))
            assert client.receive()[0] == free
            assert not any(one.error for one in client.collect(waited).values())
        assert proxy.stop() == 0
    assert image.read_bytes()[:8192] == b"C" * 4096 + bytes(4096)


def test_tls_with_certificates_on_both_sides(
    image: Path, tmp_path: Path, certificates: Certificates
) -> None:
    options = ("--tls=require", f"--tls-certificates={certificates.good}", "--tls-verify-peer")
    with nbdkit(tmp_path, *options, "file", image) as below:
        uri = tls_uri(below.uri, certificates.good)
        with Proxy(tmp_path / "proxy", uri, "--record", tmp_path / "run") as proxy:
            with proxy.client() as client:
                client.write(0, b"A" * MIB)
                assert client.read(0, MIB) == b"A" * MIB
            assert proxy.stop() == 0
        for folder, told in {
            certificates.anonymous: "cannot be used",
            certificates.foreign: "unable to get local issuer certificate",
        }.items():
            said = nbdproxy("serve", tls_uri(below.uri, folder), "--run", "true", code=2).stderr
            assert told in said
            assert said.count("\n") == 1
        assert "requires TLS" in nbdproxy("serve", below.uri, "--run", "true", code=2).stderr
        (tmp_path / "empty").mkdir()
        uri = tls_uri(below.uri, tmp_path / "empty")
        said = nbdproxy("serve", uri, "--run", "true", code=2).stderr
        assert "ca-cert.pem cannot be read" in said
    assert image.read_bytes()[: MIB + 1] == b"A" * MIB + bytes(1)
    assert state(tmp_path / "run", image) == image.read_bytes()


def test_a_server_of_another_authority_is_trusted_only_on_demand(
    image: Path, tmp_path: Path, certificates: Certificates
) -> None:
    options = ("--tls=require", f"--tls-certificates={certificates.foreign}")
    with nbdkit(tmp_path, *options, "file", image) as below:
        uri = tls_uri(below.uri, certificates.anonymous)
        said = nbdproxy("serve", uri, "--run", "true", code=2).stderr
        assert "unable to get local issuer certificate" in said
        default = below.uri.replace("nbd", "nbds", 1)  # without a folder, the system's authorities
        said = nbdproxy("serve", default, "--run", "true", code=2).stderr
        assert "certificate" in said
        with Proxy(tmp_path / "proxy", f"{uri}&tls-verify-peer=0") as proxy:
            assert tool("nbdinfo", "--size", proxy.uri) == f"{2 * MIB}\n"
            assert proxy.stop() == 0


GIB = 1 << 30


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """Four holes of a GiB each."""
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 4 * GIB)
    return path


def test_a_long_change_goes_down_whole_where_lengths_have_64_bits(
    huge: Path, tmp_path: Path
) -> None:
    with (
        Proxy(tmp_path / "lower", huge, "--record", tmp_path / "run") as below,
        Proxy(tmp_path / "upper", below.uri) as proxy,
    ):
        with proxy.client() as client:
            client.trim(4096, 3 * GIB)
            client.zero(0, 4 * GIB - 512)
        assert proxy.stop() == 0
        assert below.stop() == 0
    assert [one for one in requests(tmp_path / "run") if one[0] != "flush"] == [
        ("trim", [], 4096, 3 * GIB, None),
        ("write-zeroes", [], 0, 4 * GIB - 512, None),
    ]


def test_a_long_change_goes_down_in_pieces_where_lengths_have_32_bits(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    def script(peer: Peer) -> None:
        peer.open(4 * GIB)
        while True:
            asked = peer.request()
            if asked.command == TRIM:
                seen.append((asked.offset, asked.length, asked.flags))
            peer.serve(asked)

    with Scripted(tmp_path, script) as below, Proxy(tmp_path / "proxy", below.uri) as proxy:
        with proxy.client() as client:
            client.trim(4096, 3 * GIB - 512, FUA)
        assert proxy.stop() == 0
    assert seen == [
        *((4096, GIB, FUA), (4096 + GIB, GIB, FUA), (4096 + 2 * GIB, GIB - 512, FUA)),
    ]


@pytest.mark.parametrize("how", ["a piece fails", "a fast zero"])
def test_a_long_change_that_fails_keeps_nobody_waiting(
    huge: Path, tmp_path: Path, how: str
) -> None:
    """What comes to the same place afterwards is done, though the rest of it never went down."""
    switch = tmp_path / "on"
    options = ("error=EIO", f"error-file={switch}", "error-trim-rate=100%")
    refusing = ("zeromode=emulate", "fastzeromode=slow")
    start = (
        nbdkit(tmp_path, "--filter=error", "file", huge, *options)
        if how == "a piece fails"
        else nbdkit(tmp_path, "--filter=nozero", "file", huge, *refusing)
    )
    with start as below, Proxy(tmp_path / "proxy", below.uri) as proxy:
        with proxy.client() as client:
            switch.touch()
            fast = Op(ZERO, 0, 3 * GIB, flags=FAST_ZERO)
            (reply,) = client.do(Op(TRIM, 0, 3 * GIB) if how == "a piece fails" else fast)
            assert reply.error == (EIO if how == "a piece fails" else ENOTSUP)
            switch.unlink()
            for offset in (0, 2 * GIB):
                client.write(offset, b"A" * 512)
        assert proxy.stop() == 0


def test_a_landing_goes_on_though_its_client_is_gone(tmp_path: Path) -> None:
    """Else two writes of one place would be at work below, and the older could be done last."""
    overlapped = False
    held = threading.Event()

    def script(peer: Peer) -> None:
        nonlocal overlapped
        peer.open(MIB)
        while (asked := peer.request()).command != WRITE:
            peer.serve(asked)
        held.set()
        peer.sock.settimeout(0.5)
        try:
            following: Asked | None = peer.request()
        except TimeoutError:
            following = None
        overlapped = following is not None and following.command == WRITE
        peer.sock.settimeout(None)
        for one in (asked, following):
            if one is not None:
                peer.serve(one)
        while True:
            peer.serve(peer.request())

    with (
        Scripted(tmp_path, script) as below,
        Proxy(tmp_path / "proxy", below.uri, "--policy", "drop-unflushed") as proxy,
    ):
        rude = proxy.client()
        rude.write(0, b"1" * 512)
        rude.send(Op(FLUSH))
        assert held.wait(20)
        rude.sock.sendall(b"garbage" * 10)
        with proxy.client() as client:
            client.write(0, b"2" * 512)
            client.flush()
        rude.drop()
        assert proxy.stop() == 0
    assert not overlapped


def test_the_server_may_be_on_tcp(image: Path, tmp_path: Path) -> None:
    with (
        Proxy(tmp_path / "lower", image, "--export", "a/b c", listen="127.0.0.1:0") as below,
        Proxy(tmp_path / "upper", below.uri, listen="127.0.0.1:0") as proxy,
    ):
        assert below.uri.startswith("nbd://127.0.0.1:")
        with proxy.client() as client:
            assert client.read(0, 2 * MIB) == image.read_bytes()
            client.write(0, b"A" * MIB)
        assert proxy.stop() == 0
    assert image.read_bytes() == b"A" * MIB + bytes(MIB)

"""Servers below that lie once there are clients: EIO for those, and an orderly end with code 2.

One sentence and never a traceback, whatever the lie. What exactly the protocol forbids a server is
tested without I/O, in `tests/nbd`. Not covered: servers that stop answering, which are waited for
like a disk.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.nbd_client import FLUSH, READ, TRIM, WRITE, ZERO, Op
from tests.support.proxies import MIB, Proxy
from tests.support.raw_client import BLOCK_STATUS, RawClient
from tests.support.recordings import requests
from tests.support.scripted import (
    CONTEXT,
    DATA,
    DONE,
    HOLE,
    NONE,
    STATUS,
    Asked,
    Peer,
    Script,
    Scripted,
)
from tests.support.serving import nbdproxy

EIO, ESHUTDOWN = 5, 108
SOON_S = 5.0

Lie = Callable[[Peer, Asked], None]


def _wrong_offset(peer: Peer, asked: Asked) -> None:
    peer.chunk(asked, DATA, struct.pack(">Q", asked.offset + asked.length) + b"x" * 512)


def _twice(peer: Peer, asked: Asked) -> None:
    data = struct.pack(">Q", asked.offset) + b"x" * 512
    peer.chunk(asked, DATA, data, flags=0)
    peer.chunk(asked, DATA, data)


def _for_ever(peer: Peer, asked: Asked) -> None:
    while True:
        peer.chunk(asked, NONE, flags=0)
        peer.chunk(asked, HOLE, struct.pack(">QI", asked.offset, 512), flags=0)


def _break_off(peer: Peer, asked: Asked) -> None:
    peer.sock.sendall(b"\x66\x8e\x33")
    peer.sock.shutdown(socket.SHUT_RDWR)


READ_LIES: dict[str, Lie] = {
    "another cookie": lambda peer, asked: peer.chunk(asked._replace(cookie=4711), NONE),
    "no magic": lambda peer, _: peer.sock.sendall(b"\xff" * 64),
    "data elsewhere": _wrong_offset,
    "data twice": _twice,
    "too little data": lambda peer, asked: peer.chunk(
        asked, DATA, struct.pack(">Q", asked.offset) + b"x" * 256
    ),
    "no data": lambda peer, asked: peer.chunk(asked, NONE),
    "a giant hole": lambda peer, asked: peer.chunk(
        asked, HOLE, struct.pack(">QI", asked.offset, 0xFFFFFFFF)
    ),
    "a simple reply": lambda peer, asked: peer.sock.sendall(
        struct.pack(">IIQ", 0x67446698, 0, asked.cookie) + bytes(asked.length)
    ),
    "a chunk of 4 GiB": lambda peer, asked: peer.sock.sendall(
        struct.pack(">IHHQI", 0x668E33EF, DONE, DATA, asked.cookie, 0xFFFFFFFF)
    ),
    "chunks for ever": _for_ever,
    "an answer that breaks off": _break_off,
    "a hang-up": lambda peer, _: peer.sock.shutdown(socket.SHUT_RDWR),
    "a shutdown": lambda peer, asked: peer.fail(asked, 108, "good night"),
    "an error without a number": lambda peer, asked: peer.fail(asked, 0),
    "status instead of data": lambda peer, asked: peer.chunk(
        asked, STATUS, struct.pack(">III", CONTEXT, 512, 0)
    ),
}


def liar(command: int, lie: Lie, size: int = MIB) -> Script:
    """A server that is decent, but for the second request of a kind and all that follow."""

    def script(peer: Peer) -> None:
        peer.open(size)
        while True:
            asked = peer.request()
            if asked.command == command and asked.offset:
                lie(peer, asked)
                peer.wait_until_gone()
            else:
                peer.serve(asked)

    return script


@pytest.mark.parametrize("kind", READ_LIES)
def test_a_lie_ends_the_serving_in_order(tmp_path: Path, kind: str) -> None:
    """Two clients have requests in flight, and one of them is answered with the lie."""
    with (
        Scripted(tmp_path, liar(READ, READ_LIES[kind])) as below,
        Proxy(tmp_path / "proxy", below.uri, "--record", tmp_path / "run") as proxy,
    ):
        clients = [proxy.client(), proxy.client()]
        clients[0].write(0, b"A" * 512)
        started = time.monotonic()
        sent = [client.send(Op(READ, 512, 512), Op(READ, 1024, 512)) for client in clients]
        for client, cookies in zip(clients, sent, strict=True):
            failed = {reply.error for reply in client.collect(cookies).values()}
            assert failed <= ({EIO, ESHUTDOWN} if kind == "a shutdown" else {EIO})
        assert proxy.wait() == 2
        assert time.monotonic() - started < SOON_S
        assert proxy.sentence.startswith(f"the NBD server of {below.uri} is lost: ")
        for client in clients:
            client.drop()
    assert "is lost" in nbdproxy("info", tmp_path / "run", "--verify").stdout


EXTENTS: dict[str, tuple[int, ...]] = {
    "a sum that wraps round": (CONTEXT, 0xFFFFFE00, 0, 0xFFFFFE00, 3, 1024, 0),
    "one behind the disk": (CONTEXT, 2 * MIB, 0),
    "an empty one": (CONTEXT, 0, 0),
    "none": (CONTEXT,),
    "half a one": (CONTEXT, 512),
    "another context": (CONTEXT + 1, 512, 0),
    "too many": (CONTEXT, *(512, 0, 512, 3) * 4000),
}


@pytest.mark.parametrize("kind", EXTENTS)
def test_crafted_extents_are_not_believed(tmp_path: Path, kind: str) -> None:
    """CVE-2023-5871. They are asked for by a client's BLOCK_STATUS."""
    data = struct.pack(f">{len(EXTENTS[kind])}I", *EXTENTS[kind])
    script = liar(BLOCK_STATUS, lambda peer, asked: peer.chunk(asked, STATUS, data))
    with Scripted(tmp_path, script) as below, Proxy(tmp_path / "proxy", below.uri) as proxy:
        with RawClient(proxy.uri) as client:
            client.open_structured("base:allocation")
            assert client.error_of(Op(BLOCK_STATUS, 512, MIB - 512)).error == EIO
        assert proxy.wait() == 2
        assert proxy.sentence.startswith(f"the NBD server of {below.uri} is lost: ")


@pytest.mark.parametrize("lie", ["an extent behind the disk", "an error", "a hang-up"])
def test_a_recording_does_not_begin_on_a_lie(tmp_path: Path, lie: str) -> None:
    """What is data is asked for before the serving begins, when there is a recording."""

    def script(peer: Peer) -> None:
        peer.open(MIB)
        asked = peer.request()
        assert asked.command == BLOCK_STATUS
        if lie == "an error":
            peer.fail(asked, EIO, "no idea")
        elif lie == "an extent behind the disk":
            peer.chunk(asked, STATUS, struct.pack(">III", CONTEXT, 2 * MIB, 0))
        if lie != "a hang-up":
            peer.wait_until_gone()

    with Scripted(tmp_path, script) as below:
        words = ("serve", below.uri, "--record", tmp_path / "run", "--run", "true")
        said = nbdproxy(*words, code=2).stderr
    assert said.startswith("nbdproxy: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_server_that_hangs_up_when_it_has_let_us_in_is_lost(tmp_path: Path) -> None:
    with Scripted(tmp_path, lambda peer: peer.open(MIB)) as below:
        said = nbdproxy("serve", below.uri, "--run", "exec sleep 60", code=2, timeout_s=20).stderr
    assert f"nbdproxy: the NBD server of {below.uri} is lost: " in said


@pytest.mark.parametrize("command", [WRITE, FLUSH, TRIM, ZERO])
def test_changes_that_nobody_answers_fail_with_eio(tmp_path: Path, command: int) -> None:
    """The server takes the request, and hangs up."""

    def script(peer: Peer) -> None:
        peer.open(MIB)
        while (asked := peer.request()).command == BLOCK_STATUS:
            peer.serve(asked)

    options = ("--record", tmp_path / "run")
    with (
        Scripted(tmp_path, script) as below,
        Proxy(tmp_path / "proxy", below.uri, *options) as proxy,
    ):
        client = proxy.client()
        length = 0 if command == FLUSH else 512
        (reply,) = client.do(Op(command, 0, length, b"A" * 512 if command == WRITE else b""))
        assert reply.error == EIO
        assert proxy.wait() == 2
        client.drop()
    assert [one[-1] for one in requests(tmp_path / "run")] == ["EIO"]

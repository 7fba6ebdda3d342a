"""A server below that dies at each byte of its reply: EIO, one sentence, a recording in order."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.support.nbd_client import READ, WRITE, Op
from tests.support.proxies import MIB, Proxy
from tests.support.recordings import requests, state
from tests.support.scripted import DATA, DONE, NONE, Asked, Peer, Scripted
from tests.support.serving import nbdproxy

EIO = 5
PART = b"old data"


def reply_to(asked: Asked) -> bytes:
    """The whole reply in chunks: to a READ its data and then the end, to others the end."""
    end = struct.pack(">IHHQI", 0x668E33EF, DONE, NONE, asked.cookie, 0)
    if asked.command != READ:
        return end
    data = struct.pack(">Q", asked.offset) + PART
    return struct.pack(">IHHQI", 0x668E33EF, 0, DATA, asked.cookie, len(data)) + data + end


LENGTHS = {READ: 56, WRITE: 20}


@pytest.mark.parametrize(
    ("command", "count"),
    [(one, count) for one, length in LENGTHS.items() for count in range(length)],
)
def test_a_reply_that_breaks_off_at_any_byte(tmp_path: Path, command: int, count: int) -> None:
    def script(peer: Peer) -> None:
        peer.open(MIB)
        while (asked := peer.request()).command != command:
            peer.serve(asked)
        reply = reply_to(asked)
        assert len(reply) == LENGTHS[command]
        peer.sock.sendall(reply[:count])

    run = tmp_path / "run"
    with (
        Scripted(tmp_path, script) as below,
        Proxy(tmp_path / "proxy", below.uri, "--record", run) as proxy,
    ):
        client = proxy.client()
        op = Op(READ, 512, len(PART)) if command == READ else Op(WRITE, 512, data=b"A" * 8)
        (reply,) = client.do(op)
        assert reply.error == EIO
        assert proxy.wait() == 2
        said = proxy.sentence
        assert "with 1 requests in flight" in said
        assert "start it again" in said
        client.drop()
    told = requests(run)
    assert [one[-1] for one in told] == (["EIO"] if command == WRITE else [])
    if count in {0, LENGTHS[command] - 1}:
        assert "is lost" in nbdproxy("info", run).stdout
        base = tmp_path / "base"
        base.write_bytes(bytes(MIB))
        assert state(run, base) == bytes(MIB)

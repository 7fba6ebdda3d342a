"""Servers below that lie, dawdle, stop or attack: one sentence and exit code 2, never a traceback.

Here nothing is served yet, so the command just refuses; what comes later is in
`test_hostile_replies.py`. What exactly the protocol forbids a server is tested without I/O, in
`tests/nbd`. Not covered: what a lying server may put on the disk, which nobody can tell.
"""

from __future__ import annotations

import ssl
import struct
import time
from pathlib import Path

import pytest
import trio

from nbdproxy.errors import ImageError
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.server.below import upstream
from tests.support.certificates import Certificates
from tests.support.proxies import MIB
from tests.support.raw_client import (
    ACK,
    EXTENDED_HEADERS,
    GO,
    REP_INFO,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
    tls_uri,
)
from tests.support.scripted import (
    CONTEXT,
    DONE,
    ERR_UNSUP,
    META,
    NONE,
    Peer,
    Script,
    Scripted,
)
from tests.support.serving import nbdproxy

SOON_S = 5.0
EXPORT = struct.Struct(">HQH")
GREETING = b"NBDMAGICIHAVEOPT\0\3"


def said_of(script: Script, folder: Path) -> str:
    """The sentence with which `serve` refuses to stand above such a server, soon."""
    with Scripted(folder, script) as below:
        started = time.monotonic()
        done = nbdproxy("serve", below.uri, "--run", "true", code=2)
        assert time.monotonic() - started < SOON_S
        assert done.stderr.startswith(f"nbdproxy: the NBD server {below.uri} cannot be used: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert len(done.stderr) < 1000
    return done.stderr.partition("cannot be used: ")[2]


def says(*parts: bytes) -> Script:
    """A server that says this, and waits for the client to go."""

    def script(peer: Peer) -> None:
        for part in parts:
            peer.sock.sendall(part)
        peer.wait_until_gone()

    return script


def hangs_up_at(number: int, *parts: bytes, alive: bool = False) -> Script:
    """A server that is decent up to an option, says this, and dies unless it stays `alive`."""

    def script(peer: Peer) -> None:
        peer.greet()
        while (asked := peer.option()[0]) != number:
            peer.reply(asked, ERR_UNSUP if asked == EXTENDED_HEADERS else ACK)
        for part in parts:
            peer.sock.sendall(part)
        if alive:
            peer.wait_until_gone()

    return script


def answers(number: int, *replies: tuple[int, bytes]) -> Script:
    """A server that is decent up to an option, which it answers like this."""
    return hangs_up_at(number, *(reply(number, *one) for one in replies), alive=True)


def opens(size: int, flags: int = 1, blocks: tuple[int, int, int] | None = None) -> Script:
    """A server that tells this of its export."""
    told = [(REP_INFO, EXPORT.pack(0, size, flags))]
    if blocks is not None:
        told.append((REP_INFO, b"\0\3" + struct.pack(">III", *blocks)))
    return answers(GO, *told, (ACK, b""))


def reply(number: int, kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    """A reply to an option, whatever its data really are."""
    announced = len(data) if length is None else length
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, announced) + data


OPENED = reply(GO, REP_INFO, EXPORT.pack(0, MIB, 1)) + reply(GO, ACK)

REFUSED: dict[str, tuple[Script, str]] = {
    "another magic": (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "not an NBD server"),
    "another second magic": (says(b"NBDMAGICIHAVEOPS\0\3"), "second magic"),
    "oldstyle": (says(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(140)), "fixed newstyle"),
    "no fixed newstyle": (says(b"NBDMAGICIHAVEOPT\0\0"), "fixed newstyle"),
    "half a greeting": (lambda peer: peer.sock.sendall(GREETING[:9]), "closed the connection"),
    "nothing at all": (lambda _: None, "closed the connection"),
    "death at structured replies": (hangs_up_at(STRUCTURED_REPLY), "closed the connection"),
    "death at contexts": (hangs_up_at(SET_META_CONTEXT), "closed the connection"),
    "death at GO": (hangs_up_at(GO), "closed the connection"),
    "death in a reply": (hangs_up_at(GO, reply(GO, REP_INFO, b"\0", 12)), "closed the connection"),
    "gone right behind its greeting": (
        lambda peer: peer.sock.sendall(GREETING),
        "the server closed the connection when asked for EXTENDED_HEADERS",
    ),
    "a reply without magic": (says(GREETING, b"\xff" * 20), "reply to an option began with"),
    "a reply to what nobody asked": (says(GREETING, reply(GO, ACK)), "which was not asked"),
    "a giant reply": (says(GREETING, reply(EXTENDED_HEADERS, ACK, b"", 1 << 31)), "announces"),
    "endless infos": (
        answers(GO, *((REP_INFO, b"\0\2x"),) * 2000),
        "endless replies to GO",
    ),
    "endless contexts": (
        answers(SET_META_CONTEXT, *((META, CONTEXT.to_bytes(4) + b"base:allocation"),) * 2000),
        "same context twice",
    ),
    "a size of 2^63": (opens(1 << 63), "which cannot be"),
    "a size of 2^64 - 512": (opens((1 << 64) - 512), "which cannot be"),
    "a size of 0": (opens(0), "its export has 0 bytes"),
    "a size that is no multiple of its blocks": (
        opens(MIB + 512, blocks=(4096, 4096, MIB)),
        "multiple of 4096",
    ),
    "no size": (answers(GO, (ACK, b"")), "without telling its size"),
    "flags that are none": (opens(MIB, 0), "are not flags"),
    "block sizes that are none": (opens(MIB, blocks=(3, 4096, MIB)), "contradict"),
    "a byte behind the negotiation": (hangs_up_at(GO, OPENED + b"x"), "more than was asked for"),
    "a reply behind the negotiation": (
        hangs_up_at(GO, OPENED + struct.pack(">IHHQI", 0x668E33EF, DONE, NONE, 1, 0)),
        "is not in flight",
    ),
    "an error with a hostile text": (
        answers(GO, (0x80000006, b"\x1b[2J\nnbdproxy: all is well\n" + b"x" * 4000)),
        "the server has no export",
    ),
    "a shutdown": (answers(GO, (0x80000007, b"")), "the server is shutting down"),
    "TLS alone": (answers(EXTENDED_HEADERS, (0x80000005, b"")), "the server requires TLS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_cannot_be_used_is_refused(tmp_path: Path, case: str) -> None:
    script, expected = REFUSED[case]
    assert expected in said_of(script, tmp_path)


SILENT: dict[str, Script] = {
    "from the beginning": says(),
    "after the greeting": says(GREETING),
    "within a reply": says(GREETING, reply(EXTENDED_HEADERS, ACK)[:7]),
}


def _dribble(peer: Peer) -> None:
    """Answer with one byte of a long text after the other, for ever."""
    peer.greet()
    peer.sock.sendall(reply(EXTENDED_HEADERS, 0x80000001, b"", 60000))
    peer.sock.settimeout(0.01)
    while True:
        try:
            peer.sock.sendall(b"x")
            peer.sock.recv(1)
        except TimeoutError:
            continue


@pytest.mark.parametrize("script", [*SILENT.values(), _dribble], ids=[*SILENT, "dribbling"])
def test_a_server_that_stalls_is_given_up(
    tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten seconds; here, after far less."""
    monkeypatch.setattr(upstream, "CONNECT_S", 0.3)

    async def main(text: str) -> None:
        async with upstream.connected(nbd_uri.parse(text), "under test"):
            raise AssertionError("it was let in")

    with Scripted(tmp_path, script) as below:
        started = time.monotonic()
        with pytest.raises(ImageError) as refused:
            trio.run(main, below.uri)
        assert time.monotonic() - started < SOON_S
    words = "the NBD server under test cannot be used: it did not let us in within 0.3 s"
    assert str(refused.value).startswith(words)


def test_plaintext_behind_the_answer_to_starttls_is_refused(
    tmp_path: Path, certificates: Certificates
) -> None:
    """CVE-2021-3716, turned round: whoever sits in between must not slip in an answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        certificates.good / "server-cert.pem", certificates.good / "server-key.pem"
    )

    def script(peer: Peer) -> None:
        peer.greet()
        assert peer.option()[0] == STARTTLS
        peer.sock.sendall(reply(STARTTLS, ACK) + reply(EXTENDED_HEADERS, 0x80000001))
        with context.wrap_socket(peer.sock, server_side=True) as secure:
            secure.recv(1)

    with Scripted(tmp_path, script) as below:
        uri = tls_uri(below.uri, certificates.good)
        said = nbdproxy("serve", uri, "--run", "true", code=2).stderr
    assert "plaintext where TLS begins" in said
    assert said.count("\n") == 1

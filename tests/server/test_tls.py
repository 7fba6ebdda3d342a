"""TLS with real clients (libnbd, QEMU) and with one that knows how to be wrong.

What certificates are worth is in `test_tls_certificates.py`, nbdproxy as a client in TLS in
`test_upstream.py`. Not covered: how TLS itself is spoken, which is OpenSSL's.
"""

from __future__ import annotations

import json
import random
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import raw_client as raw
from tests.support.certificates import Certificates, client_context
from tests.support.nbd_client import FUA, READ, WRITE, Op
from tests.support.proxies import MIB, Proxy
from tests.support.raw_client import RawClient, TlsClient, assert_served, tls_uri
from tests.support.serving import Server, nbdproxy, tool

SIZE = 8 * MIB
SOON_S = 2.0
HASTY = (
    sys.executable,
    "-c",
    "import nbdproxy.server.service as s; s._GRACE_S = 0.3\n"
    "from nbdproxy.cli.app import main; main()",
)
"""The command, with less patience at the end for clients that do not take their replies."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2))
    return path


Serve = Callable[..., Proxy]


def test_require_takes_tls_alone(serve: Serve, certificates: Certificates) -> None:
    proxy = serve("require")
    assert proxy.uri.startswith("nbds+unix:///?socket=")
    told = tool("nbdinfo", tls_uri(proxy.uri, certificates.good))
    assert "protocol: newstyle-fixed with TLS" in told
    assert f"export-size: {SIZE}" in told
    tool("nbdinfo", proxy.uri.replace("nbds", "nbd", 1), code=1)
    assert_served(proxy.uri, client_context(certificates.good))


def test_allow_takes_both(serve: Serve, certificates: Certificates) -> None:
    proxy = serve("allow")
    assert proxy.uri.startswith("nbd+unix:///?socket=")
    assert "with TLS" in tool("nbdinfo", tls_uri(proxy.uri, certificates.good))
    assert "without TLS" in tool("nbdinfo", proxy.uri)


def test_off_refuses_starttls_and_takes_plaintext(serve: Serve, certificates: Certificates) -> None:
    proxy = serve("off")
    tool("nbdinfo", tls_uri(proxy.uri, certificates.good), code=1)
    assert "without TLS" in tool("nbdinfo", proxy.uri)
    with RawClient(proxy.uri) as client:
        assert client.word(raw.STARTTLS) == raw.ERR_POLICY
        assert client.word(raw.LIST) == raw.ACK


PLAINTEXT = {
    "LIST": (raw.LIST, b""),
    "INFO": (raw.INFO, raw.name_and_infos("", 3)),
    "GO": (raw.GO, raw.name_and_infos("")),
    "STRUCTURED_REPLY": (raw.STRUCTURED_REPLY, b""),
    "EXTENDED_HEADERS": (raw.EXTENDED_HEADERS, b""),
    "LIST_META_CONTEXT": (raw.LIST_META_CONTEXT, raw.name_and_contexts("")),
    "SET_META_CONTEXT": (raw.SET_META_CONTEXT, raw.name_and_contexts("", "base:allocation")),
    "an unknown one": (raw.UNKNOWN_OPTION, b"data"),
}


def test_require_answers_every_option_in_the_clear_with_tls_reqd(
    serve: Serve, certificates: Certificates
) -> None:
    proxy = serve("require")
    with RawClient(proxy.uri) as client:
        for name, (number, data) in PLAINTEXT.items():
            ((kind, _),) = client.ask(number, data)
            assert kind == raw.ERR_TLS_REQD, name
        client.start_tls(client_context(certificates.good))
        assert client.word(raw.LIST) == raw.ACK
    with RawClient(proxy.uri) as client:
        assert client.ask(raw.ABORT) == [(raw.ACK, b"")]
        assert client.rest() == b""
    with RawClient(proxy.uri) as client:
        client.sock.sendall(raw.option(raw.EXPORT_NAME))
        assert client.rest() == b""


@pytest.mark.parametrize(
    "behind", [raw.option(raw.LIST), raw.option(raw.GO, raw.name_and_infos("")), b"I"]
)
def test_bytes_behind_starttls_end_the_connection(
    serve: Serve, certificates: Certificates, behind: bytes
) -> None:
    """CVE-2021-3716: they must not be taken for what TLS protects, handshake or not."""
    proxy = serve("allow")
    with RawClient(proxy.uri) as client:
        started = time.monotonic()
        client.sock.sendall(raw.option(raw.STARTTLS) + behind)
        assert client.take(20) == struct.pack(">QIII", 0x3E889045565A9, raw.STARTTLS, raw.ACK, 0)
        with pytest.raises(OSError):
            context = client_context(certificates.good)
            context.wrap_socket(client.sock, server_hostname="localhost")
        assert time.monotonic() - started < SOON_S
    assert "the client sent more before STARTTLS was answered" in proxy.stderr
    assert_served(proxy.uri, client_context(certificates.good))


@pytest.mark.parametrize("before", [raw.STRUCTURED_REPLY, raw.EXTENDED_HEADERS])
def test_what_was_negotiated_in_the_clear_is_forgotten(
    serve: Serve, certificates: Certificates, before: int
) -> None:
    """Inside TLS a context needs structured replies anew, and READ has a simple reply."""
    proxy = serve("allow")
    with RawClient(proxy.uri) as client:
        assert client.word(before) == raw.ACK
        client.start_tls(client_context(certificates.good))
        wanted = raw.name_and_contexts("", "base:allocation")
        assert client.word(raw.SET_META_CONTEXT, wanted) == raw.ERR_INVALID
        assert client.word(raw.STARTTLS) == raw.ERR_INVALID
        assert client.word(raw.GO, raw.name_and_infos("")) == raw.ACK
        client.sock.sendall(raw.request(READ, 0, 512, cookie=7))
        assert client.take(16) == struct.pack(">IIQ", 0x67446698, 0, 7)


def test_beyond_this_machine_nothing_goes_without_tls_or_a_warning(
    serve: Serve, certificates: Certificates, image: Path
) -> None:
    for words in ((), ("--tls", "allow", "--tls-certificates", certificates.good)):
        said = nbdproxy("serve", image, "--listen", "0.0.0.0:0", *words, code=2).stderr
        assert "add --tls require --tls-verify-peer, or --insecure" in said
    warned = serve("off", "--insecure", listen="0.0.0.0:0")
    assert (
        "warning: anybody who reaches 0.0.0.0:0 can read and write the disk, and listen in; --tls "
        "require --tls-verify-peer keeps out whoever has no certificate of your CA\n"
    ) in warned.stderr
    port = warned.uri.rstrip("/").rpartition(":")[2]
    assert tool("nbdinfo", "--size", f"nbd://127.0.0.1:{port}") == f"{SIZE}\n"
    assert warned.stop() == 0
    safe = serve("require", "--tls-verify-peer", listen="0.0.0.0:0")
    assert "warning" not in safe.stderr
    port = safe.uri.rstrip("/").rpartition(":")[2]
    with TlsClient(f"nbd://127.0.0.1:{port}", client_context(certificates.good)) as client:
        assert client.size == SIZE


def test_tls_without_certificates_of_clients_keeps_nobody_out(
    serve: Serve, certificates: Certificates, image: Path
) -> None:
    """Anybody can speak TLS: beyond this machine a disk is written by whom the CA knows."""
    tls = ("--tls", "require", "--tls-certificates", certificates.good)
    said = nbdproxy("serve", image, "--listen", "0.0.0.0:0", *tls, "--overlay", code=2).stderr
    assert "add --tls-verify-peer, or --read-only, or --insecure" in said
    for more, can in (("--insecure", "read and write"), ("--read-only", "read")):
        proxy = serve("require", more, listen="0.0.0.0:0")
        assert (
            f"warning: anybody who reaches 0.0.0.0:0 can {can} the disk; --tls-verify-peer keeps "
            "out whoever has no certificate of your CA\n"
        ) in proxy.stderr
        port = proxy.uri.rstrip("/").rpartition(":")[2]
        with TlsClient(f"nbd://127.0.0.1:{port}", client_context(certificates.anonymous)) as client:
            assert client.size == SIZE
        assert proxy.stop() == 0
    assert "warning" not in serve("require", listen="127.0.0.1:0").stderr


def test_loopback_needs_no_tls_and_warns_of_nothing(serve: Serve) -> None:
    proxy = serve("off", listen="127.0.0.1:0")
    assert "warning" not in proxy.stderr


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(
    serve: Serve, certificates: Certificates, version: ssl.TLSVersion
) -> None:
    context = client_context(certificates.good)
    context.minimum_version = context.maximum_version = version
    with TlsClient(serve("require").uri, context) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        assert client.sock.version() == version.name.replace("_", ".")


def test_tls_1_1_is_refused(serve: Serve, certificates: Certificates) -> None:
    """The hello is made by hand: the library here may not speak the version any more."""
    proxy = serve("require")
    with RawClient(proxy.uri) as client:
        assert client.word(raw.STARTTLS) == raw.ACK
        ciphers = bytes.fromhex("c009c00ac013c014002f0035")
        hello = struct.pack(">H32sB", 0x0302, bytes(32), 0)
        hello += struct.pack(">H", len(ciphers)) + ciphers + b"\1\0\0\0"
        message = b"\1" + len(hello).to_bytes(3) + hello
        client.sock.sendall(struct.pack(">BHH", 22, 0x0301, len(message)) + message)
        assert client.rest()[:1] in {b"", b"\x15"}, "neither closed nor an alert"
    assert "unsupported protocol" in proxy.stderr
    assert_served(proxy.uri, client_context(certificates.good))


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_goes_in_and_out_byte_by_byte(
    serve: Serve,
    certificates: Certificates,
    image: Path,
    tmp_path: Path,
    connections: int,
) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(random.Random(3).randbytes(6 * MIB) + bytes(2 * MIB))
    options = [f"--connections={connections}", "--requests=16"]
    proxy = serve("require", "--tls-verify-peer", "--record", tmp_path / "run")
    uri = tls_uri(proxy.uri, certificates.good)
    tool("nbdcopy", *options, "--flush", source, uri)
    tool("nbdcopy", *options, uri, back)
    assert proxy.stop() == 0
    assert image.read_bytes() == source.read_bytes() == back.read_bytes()
    nbdproxy("info", tmp_path / "run", "--verify")


def test_qemu_img_goes_in_and_out(
    serve: Serve, certificates: Certificates, image: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(4).randbytes(5 * MIB) + bytes(3 * MIB))
    proxy = serve("require", "--tls-verify-peer", "--export", "disk one")
    creds = f"tls-creds-x509,id=tls,endpoint=client,dir={certificates.good}"
    target = ",".join(
        f"file.{key}={value}"
        for key, value in {
            "driver": "nbd",
            "server.type": "unix",
            "server.path": proxy.socket,
            "export": "disk one",
            "tls-creds": "tls",
            "tls-hostname": "localhost",
        }.items()
    )
    common = ("--object", creds)
    told = tool(
        "qemu-img", "info", "--output=json", *common, "--image-opts", f"driver=raw,{target}"
    )
    assert json.loads(told)["virtual-size"] == SIZE
    opened = ("--image-opts", f"driver=raw,{target}")
    tool("qemu-img", "convert", "-n", "--target-image-opts", *common, source, opened[1])
    tool("qemu-img", "convert", *common, *opened, tmp_path / "back")
    assert proxy.stop() == 0
    assert image.read_bytes() == source.read_bytes() == (tmp_path / "back").read_bytes()


def stalled(uri: str, certificates: Certificates) -> TlsClient:
    """A client in TLS that asked for 64 MiB and reads nothing of it."""
    client = TlsClient(uri, client_context(certificates.good))
    for _ in range(16):
        client.send(Op(READ, 0, 4 * MIB))
    assert select.select([client.sock], [], [], 20)[0]
    return client


def test_a_client_that_stops_reading_holds_up_nobody(
    serve: Serve, certificates: Certificates
) -> None:
    proxy = serve("require")
    slow = stalled(proxy.uri, certificates)
    for _ in range(3):
        assert_served(proxy.uri, client_context(certificates.good))
    replies = slow.collect(list(slow.waiting))
    assert len(replies) == 16
    slow.disc()
    assert proxy.stop() == 0


def test_a_client_that_stops_reading_does_not_hold_up_the_end(
    certificates: Certificates, image: Path
) -> None:
    options = ("--tls", "require", "--tls-certificates", certificates.good)
    with Server(image, *options, command=HASTY) as server:
        slow = stalled(server.uri, certificates)
        idle = TlsClient(server.uri, client_context(certificates.good))
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < SOON_S
        assert "Traceback" not in server.stderr
    assert idle.sock.recv(1) == b""
    slow.drop()
    idle.drop()


def test_idle_clients_in_tls_do_not_hold_up_the_end(
    serve: Serve, certificates: Certificates
) -> None:
    proxy = serve("require")
    idle = [TlsClient(proxy.uri, client_context(certificates.good)) for _ in range(10)]
    with RawClient(proxy.uri) as shaking:
        assert shaking.word(raw.STARTTLS) == raw.ACK
        started = time.monotonic()
        assert proxy.stop() == 0
        assert time.monotonic() - started < SOON_S
    for client in idle:
        assert client.sock.recv(1) == b""
        client.drop()


def test_a_cut_ends_tls_without_a_word(
    serve: Serve, certificates: Certificates, image: Path
) -> None:
    before = image.read_bytes()
    proxy = serve("require", "--policy", "drop-unflushed")
    client = TlsClient(proxy.uri, client_context(certificates.good))
    client.write(0, b"A" * 4096)
    assert proxy.stop() == 0
    client.drop()
    assert image.read_bytes() == before


def test_tls_that_breaks_ends_one_connection_alone(
    serve: Serve, certificates: Certificates, image: Path
) -> None:
    """In the handshake, between requests, and with requests in flight."""
    proxy = serve("require", "--tls-verify-peer")
    context = client_context(certificates.good)
    for rubbish in (b"", b"\x16\x03\x01\x02\x00\x01", raw.garbage(1, 5000)):
        with RawClient(proxy.uri) as client:
            assert client.word(raw.STARTTLS) == raw.ACK
            client.sock.sendall(rubbish)
    for rubbish in (b"", b"\x17\x03\x03\x00\x20", raw.garbage(2, 5000)):
        busy = TlsClient(proxy.uri, context)
        busy.send(*[Op(WRITE, n * 4096, data=b"C" * 4096, flags=FUA) for n in range(50)])
        busy.send(*[Op(READ, 0, MIB) for _ in range(20)])
        with socket.socket(fileno=busy.sock.detach()) as bare:
            bare.sendall(rubbish)
    assert_served(proxy.uri, context)
    assert proxy.stop() == 0
    assert set(image.read_bytes()[: 50 * 4096]) == {ord("C")}

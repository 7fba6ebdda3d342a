"""The black-box suite: nbdproxy is right in every check; against its peers the suite runs.

And the suite itself: what a server must not say is noticed. Servers are shared by the checks that
want the same setup, as in `scripts/interop`.

Not covered: which faults the peers have; `scripts/interop` prints them.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.blackbox import haggle as h
from tests.blackbox.bench import Bench
from tests.blackbox.certificates import make_certificates
from tests.blackbox.check import Check, Result, Verdict, run
from tests.blackbox.checks import all_checks
from tests.blackbox.haggle import Export, Haggle
from tests.blackbox.ops import DF, PAYLOAD_LEN, READ, REQ_ONE, STATUS, WRITE, Op
from tests.blackbox.report import as_json, document
from tests.blackbox.servers import OURS, PEERS, Kind
from tests.blackbox.transmit import Style, Transmission
from tests.blackbox.wire import Clock, ViolationError, Wire

CHECKS = all_checks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with certificates; servers make their own folders beside them."""
    path = tmp_path_factory.mktemp("bb")
    make_certificates(path / "certificates")
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[Bench]:
    """Servers of nbdproxy."""
    bench = Bench(OURS, folder, folder / "certificates")
    yield bench
    bench.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_nbdproxy_is_right(ours: Bench, check: Check) -> None:
    result = run(check, ours)
    passed = "\n".join(result.transcript)
    told = f"{check.says}: {result.word} ({result.detail})\n{passed}"
    paste = f"scripts/interop --server nbdproxy --check {check.id} --json"
    assert result.verdict is Verdict.RIGHT, f"{told}\n{paste}"


def _measure(peer: Kind, folder: Path) -> list[Result]:
    bench = Bench(peer, folder, folder / "certificates")
    try:
        return [run(check, bench) for check in CHECKS]
    finally:
        bench.close()


@pytest.fixture(scope="module")
def measured(folder: Path) -> Iterator[dict[str, Future[list[Result]]]]:
    """The results of all peers, measured at the same time because most of it is waiting."""
    with ThreadPoolExecutor(len(PEERS)) as pool:
        yield {peer.name: pool.submit(_measure, peer, folder) for peer in PEERS}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_the_suite_runs_against_a_peer(
    peer: Kind, measured: dict[str, Future[list[Result]]]
) -> None:
    """A peer that is missing is an error: the interop tests need it."""
    version, results = peer.version(), measured[peer.name].result()
    words = {result.check.id: result.word for result in results}
    assert words["greeting"] == "yes"
    assert words["read"] == words["write"] == "yes"
    assert "no start" not in words.values()
    assert version in document(results, {peer.name: version}, OURS.name)
    assert as_json(results, {peer.name: version})["versions"] == {peer.name: version}


@contextlib.contextmanager
def _told(said: bytes, tmp_path: Path) -> Iterator[Haggle]:
    """A connection in negotiation with a server that says those bytes, whatever it hears."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        wire = Wire(tmp_path / "s", Clock(10))
        with listener.accept()[0] as peer:
            peer.sendall(h.GREETING + b"\0\3" + said)
            yield Haggle(wire).start()
            wire.close()


def _option(kind: int, data: bytes = b"", option: int = h.INFO) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def _export(size: int = 1 << 20) -> bytes:
    return _option(h.REP_INFO, struct.pack(">HQH", 0, size, 1))


NEGOTIATIONS = {
    "another magic": struct.pack(">QIII", 0x3E889045565A8, h.INFO, 1, 0),
    "another option's number": _option(h.ACK, option=h.GO),
    "an unknown kind of reply": _option(77),
    "an ACK with data": _export() + _option(h.ACK, b"x"),
    "success without INFO_EXPORT": _option(h.ACK),
    "INFO_EXPORT of a wrong length": _option(h.REP_INFO, bytes(11)) + _option(h.ACK),
    "a text that is not UTF-8": _option(0x80000003, b"\xff"),
    "a text with NUL": _option(0x80000003, b"a\0b"),
    "a text that is too long": _option(0x80000003, b"a" * 4097),
    "a reply to LIST": _option(h.SERVER, bytes(4)) + _option(h.ACK),
}


@pytest.mark.parametrize("said", NEGOTIATIONS.values(), ids=NEGOTIATIONS.keys())
def test_what_a_server_must_not_say_in_negotiation(said: bytes, tmp_path: Path) -> None:
    with _told(said, tmp_path) as haggle, pytest.raises(ViolationError):
        haggle.describe(h.INFO, "disk")


def _chunk(kind: int, body: bytes = b"", *, done: bool = True, flags: int = 0) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done | flags, kind, 1, len(body)) + body


def _extended(kind: int, body: bytes = b"", *, offset: int = 4096) -> bytes:
    return struct.pack(">IHHQQQ", 0x6E8A278C, 1, kind, 1, offset, len(body)) + body


SIMPLE_OK = struct.pack(">IIQ", 0x67446698, 0, 1)
READ_4K, STATUS_4K = Op(READ, 4096, 4096), Op(STATUS, 4096, 4096)
AT = struct.pack(">Q", 4096)
ERROR_22 = struct.pack(">IH", 22, 0)
TWO_EXTENTS = struct.pack(">5I", 1, 2048, 0, 2048, 3)

ANSWERS: dict[str, tuple[Style, Op, bytes]] = {
    "an unknown cookie": (Style.SIMPLE, READ_4K, struct.pack(">IIQ", 0x67446698, 0, 9)),
    "an unknown error": (Style.SIMPLE, READ_4K, struct.pack(">IIQ", 0x67446698, 61, 1)),
    "a chunk where nobody asked for it": (Style.SIMPLE, READ_4K, _chunk(32769, ERROR_22)),
    "a simple reply to a READ": (
        *(Style.STRUCTURED, READ_4K),
        struct.pack(">IIQ", 0x67446698, 22, 1),
    ),
    "too little data": (Style.STRUCTURED, READ_4K, _chunk(1, AT + bytes(512))),
    "data outside the request": (Style.STRUCTURED, READ_4K, _chunk(1, bytes(8) + bytes(4096))),
    "overlapping data": (
        *(Style.STRUCTURED, READ_4K),
        _chunk(1, AT + bytes(4096), done=False) + _chunk(2, AT + struct.pack(">I", 512)),
    ),
    "fragments in spite of DF": (
        *(Style.STRUCTURED, READ_4K._replace(flags=DF)),
        _chunk(1, AT + bytes(2048), done=False) + _chunk(1, struct.pack(">Q", 6144) + bytes(2048)),
    ),
    "NONE that is not the last": (Style.STRUCTURED, READ_4K, _chunk(0, done=False)),
    "an unknown reply flag": (Style.STRUCTURED, READ_4K, _chunk(32769, ERROR_22, flags=2)),
    "an error without a number": (Style.STRUCTURED, READ_4K, _chunk(32769, bytes(6))),
    "a text longer than its chunk": (
        *(Style.STRUCTURED, READ_4K),
        _chunk(32769, struct.pack(">IH", 22, 9) + b"short"),
    ),
    "an error outside the request": (
        *(Style.STRUCTURED, READ_4K),
        _chunk(32770, ERROR_22 + struct.pack(">Q", 1 << 40)),
    ),
    "extents to a READ": (Style.STRUCTURED, READ_4K, _chunk(5, TWO_EXTENTS)),
    "success without extents": (Style.STRUCTURED, STATUS_4K, _chunk(0)),
    "success by a simple reply": (Style.STRUCTURED, STATUS_4K, SIMPLE_OK),
    "an unknown context": (Style.STRUCTURED, STATUS_4K, _chunk(5, struct.pack(">3I", 2, 4096, 0))),
    "an extent of nothing": (Style.STRUCTURED, STATUS_4K, _chunk(5, struct.pack(">3I", 1, 0, 0))),
    "two extents in spite of REQ_ONE": (
        *(Style.STRUCTURED, STATUS_4K._replace(flags=REQ_ONE)),
        _chunk(5, TWO_EXTENTS),
    ),
    "more extents than asked for": (
        *(Style.STRUCTURED, STATUS_4K),
        _chunk(5, struct.pack(">5I", 1, 4096, 0, 512, 3)),
    ),
    "a simple reply": (Style.EXTENDED, Op(WRITE, 4096, data=bytes(512)), SIMPLE_OK),
    "a structured reply": (Style.EXTENDED, READ_4K, _chunk(32769, ERROR_22)),
    "another offset": (Style.EXTENDED, READ_4K, _extended(32769, ERROR_22, offset=0)),
    "short extents": (Style.EXTENDED, STATUS_4K, _extended(5, TWO_EXTENTS)),
    "a wrong count of extents": (
        *(Style.EXTENDED, STATUS_4K),
        _extended(6, struct.pack(">IIQQ", 1, 2, 4096, 0)),
    ),
    "a state of more than 32 bits": (
        *(Style.EXTENDED, STATUS_4K),
        _extended(6, struct.pack(">IIQQ", 1, 1, 4096, 1 << 32)),
    ),
    "a context that was filtered out": (
        *(Style.EXTENDED, Op(STATUS, 4096, data=struct.pack(">QI", 512, 1), flags=PAYLOAD_LEN)),
        _extended(6, struct.pack(">IIQQ", 3, 1, 4096, 0)),
    ),
}


@pytest.mark.parametrize(("style", "op", "said"), ANSWERS.values(), ids=ANSWERS.keys())
def test_what_a_server_must_not_answer(style: Style, op: Op, said: bytes, tmp_path: Path) -> None:
    with _told(said, tmp_path) as haggle, pytest.raises(ViolationError):
        haggle.structured, haggle.extended = style is not Style.SIMPLE, style is Style.EXTENDED
        haggle.contexts = {1: h.ALLOCATION}
        Transmission(haggle, Export(size=1 << 20, flags=1)).do(op)

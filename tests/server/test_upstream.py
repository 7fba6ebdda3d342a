"""nbdproxy above real NBD servers: what goes down and what comes up is the truth, byte by byte.

Above nbdkit, qemu-nbd, QEMU's storage daemon, nbd-server and another nbdproxy. Policies and order
are in `test_upstream_work.py`, how it ends in `test_upstream_ends.py`, servers that lie in
`test_hostile_upstream.py`, qcow2 in `test_qcow2.py`.
Not covered: servers on other machines.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import nbd_client as nbd
from tests.support.images import write_sparse
from tests.support.lower import KINDS, Lower, nbdkit, qemu_nbd
from tests.support.nbd_client import FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, ZERO, NbdError, Op
from tests.support.proxies import MIB, Proxy
from tests.support.raw_client import RawClient
from tests.support.recordings import requests, state
from tests.support.scripted import Peer, Scripted
from tests.support.serving import tool

SIZE = 4 * MIB
EIO, ENOMEM, EINVAL, ENOSPC = 5, 12, 22, 28
SEND_CACHE, FAST_ZERO, READ_ONLY = 1024, 2048, 2


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a hole, data, a hole."""
    data = random.Random(1).randbytes(MIB)
    return write_sparse(
        tmp_path / "image", data + bytes(MIB) + data[:65536] + bytes(2 * MIB - 65536)
    )


class Below:
    """Whatever serves the image: another server, or another nbdproxy."""

    def __init__(self, kind: str, folder: Path, image: Path) -> None:
        self.kind = kind
        self._running: Lower | Proxy = (
            Proxy(folder / "lower", image) if kind == "nbdproxy" else KINDS[kind](folder, image)
        )
        self.uri = self._running.uri

    def close(self) -> None:
        self._running.close()


@pytest.fixture(params=[*KINDS, "nbdproxy"])
def below(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Below]:
    """Each kind of server on the image."""
    running = Below(request.param, tmp_path, image)
    yield running
    running.close()


def test_real_clients_go_in_and_out_byte_by_byte(below: Below, image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    source, back, again = (tmp_path / name for name in ("source", "back", "again"))
    source.write_bytes(bytes(MIB) + random.Random(3).randbytes(2 * MIB) + bytes(MIB))
    with Proxy(tmp_path / "proxy", below.uri, "--record", tmp_path / "run") as proxy:
        tool("nbdcopy", "--connections=4", proxy.uri, back)
        assert back.read_bytes() == before
        tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, proxy.uri)
        tool("qemu-img", "convert", "-f", "raw", "-O", "raw", proxy.uri, again)
        assert again.read_bytes() == source.read_bytes()
        tool("nbdcopy", "--connections=4", "--flush", back, proxy.uri)
        tool("nbdcopy", "--flush", source, proxy.uri)
        assert proxy.stop() == 0, proxy.stderr
    assert image.read_bytes() == source.read_bytes()
    assert state(tmp_path / "run", image) == source.read_bytes()


def test_the_map_is_the_one_below(below: Below, tmp_path: Path) -> None:
    with Proxy(tmp_path / "proxy", below.uri) as proxy:
        above = json.loads(tool("nbdinfo", "--map", "--json", proxy.uri))
        if below.kind == "nbd-server":  # it has none, so that all may be data
            assert [(one["type"], one["length"]) for one in above] == [(0, SIZE)]
            return
        assert above == json.loads(tool("nbdinfo", "--map", "--json", below.uri))
        assert [(one["type"] & 2, one["length"]) for one in above] == [
            *((0, MIB), (2, MIB), (0, 65536), (2, 2 * MIB - 65536))
        ]
        qemus = [tool("qemu-img", "map", "--output=json", uri) for uri in (below.uri, proxy.uri)]
        assert qemus[0] == qemus[1]


ABLE = nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_ZERO | SEND_CACHE | FAST_ZERO
ASK = {
    nbd.SEND_FLUSH: Op(FLUSH),
    nbd.SEND_FUA: Op(WRITE, 0, data=b"A" * 512, flags=FUA),
    nbd.SEND_TRIM: Op(TRIM, 0, 512),
    SEND_CACHE: Op(5, 0, 512),
}
CAN = {"write": "exit 0", "flush": "exit 0", "trim": "exit 0", "fua": "echo native"}
OFFERS: dict[str, tuple[dict[str, str], int]] = {
    "no flush": ({"flush": "exit 3"}, nbd.SEND_FLUSH),
    "no fua": ({"fua": "echo none"}, nbd.SEND_FUA),
    "no trim": ({"trim": "exit 3"}, nbd.SEND_TRIM),
    "no cache": ({"cache": "echo none"}, SEND_CACHE),
}


@pytest.mark.parametrize("offer", OFFERS)
def test_what_the_server_cannot_is_not_offered(tmp_path: Path, offer: str) -> None:
    """The server is a shell script that has only opinions, and zeroes."""
    differently, missing = OFFERS[offer]
    answers = [f"can_{what}={how}" for what, how in {**CAN, **differently}.items()]
    size = (f"get_size=echo {SIZE}", f"pread=head -c $3 {tmp_path}/zeroes")
    (tmp_path / "zeroes").write_bytes(bytes(SIZE))
    with (
        nbdkit(tmp_path, "eval", *size, *answers, "pwrite=cat >/dev/null", "trim=") as below,
        Proxy(tmp_path / "proxy", below.uri) as proxy,
    ):
        with proxy.client() as client, nbd.NbdClient(below.uri) as direct:
            assert client.flags & ABLE == direct.flags & ABLE
            assert not client.flags & missing
            (reply,) = client.do(ASK[missing])
            assert reply.error == EINVAL
        assert proxy.stop() == 0


@pytest.mark.parametrize("options", [(), ("--overlay",), ("--policy", "drop-unflushed")])
@pytest.mark.parametrize("is_rotational", [True, False])
def test_a_rotating_disk_stays_one(
    image: Path, tmp_path: Path, options: tuple[str, ...], is_rotational: bool
) -> None:
    answer = f"is_rotational=exit {0 if is_rotational else 3}"
    size = (f"get_size=echo {SIZE}", f"pread=head -c $3 {image}")
    with (
        nbdkit(tmp_path, "eval", *size, answer) as below,
        Proxy(tmp_path / "proxy", below.uri, *options) as proxy,
        proxy.client() as client,
        nbd.NbdClient(below.uri) as direct,
    ):
        assert bool(client.flags & ROTATIONAL) == is_rotational
        assert bool(direct.flags & ROTATIONAL) == is_rotational


def test_what_a_server_can_is_offered(image: Path, tmp_path: Path) -> None:
    with qemu_nbd(tmp_path, image) as below, Proxy(tmp_path / "proxy", below.uri) as proxy:
        client = proxy.client()
        assert client.flags & ABLE == ABLE
        client.disc()


@pytest.mark.parametrize("policy", ["passthrough", "drop-unflushed"])
def test_a_read_only_server_makes_a_read_only_export(
    image: Path, tmp_path: Path, policy: str
) -> None:
    before = image.read_bytes()
    options = ("--record", tmp_path / "run", "--policy", policy)
    with (
        nbdkit(tmp_path, "--readonly", "file", image) as below,
        Proxy(tmp_path / "proxy", below.uri, *options) as proxy,
    ):
        with proxy.client() as client:
            assert client.flags & READ_ONLY
            with pytest.raises(NbdError) as refused:
                client.write(0, b"A" * 512)
            assert refused.value.errno == nbd.EPERM
            assert client.read(0, SIZE) == before
        assert proxy.stop() == 0
    assert image.read_bytes() == before == state(tmp_path / "run", image)


def test_an_overlay_may_be_written_above_a_read_only_server(image: Path, tmp_path: Path) -> None:
    with (
        nbdkit(tmp_path, "--readonly", "file", image) as below,
        Proxy(tmp_path / "proxy", below.uri, "--overlay") as proxy,
        proxy.client() as client,
    ):
        client.write(0, b"A" * 512)
        assert client.read(0, 512) == b"A" * 512


ROTATIONAL = 16
BLOCKS = ("blocksize-preferred=64K", "blocksize-error-policy=error")


@pytest.mark.parametrize("options", [(), ("--policy", "drop-unflushed")])
@pytest.mark.parametrize(("least", "most"), [("4096", "64M"), ("64K", "64K")])
def test_block_sizes_are_those_of_the_server(
    image: Path, tmp_path: Path, least: str, most: str, options: tuple[str, ...]
) -> None:
    """The server refuses whatever is misaligned, or too long."""
    before = image.read_bytes()
    sizes = (f"blocksize-minimum={least}", f"blocksize-maximum={most}")
    words = ("--filter=blocksize-policy", "file", image, *sizes, *BLOCKS)
    record = ("--record", tmp_path / "run")
    with (
        nbdkit(tmp_path, *words) as below,
        Proxy(tmp_path / "proxy", below.uri, *options, *record) as proxy,
    ):
        with proxy.client() as client:
            block = 4096 if least == "4096" else 65536
            assert client.block_sizes == (block, 65536, 32 * MIB if most == "64M" else 65536)
            for misaligned in (Op(READ, 512, block), Op(WRITE, 0, data=b"A" * 512)):
                (reply,) = client.do(misaligned)
                assert reply.error == EINVAL
            client.write(block, b"A" * block)
            client.flush()
            assert client.read(0, 2 * block if most == "64M" else block)[:block] == before[:block]
        assert proxy.stop() == 0
    expected = before[:block] + b"A" * block + before[2 * block :]
    assert image.read_bytes() == expected == state(tmp_path / "run", image)


@pytest.mark.parametrize("options", [(), ("--policy", "drop-unflushed")])
def test_an_overlay_hides_the_servers_block_sizes(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Also from a read of the longest kind that is misaligned below."""
    data = random.Random(2).randbytes(256) * (36 * MIB // 256)
    sizes = ("blocksize-minimum=4096", "blocksize-maximum=64M")
    big = tmp_path / "big"
    big.write_bytes(data)
    words = ("--filter=blocksize-policy", "file", str(big), *sizes, *BLOCKS)
    with (
        nbdkit(tmp_path, *words) as below,
        Proxy(tmp_path / "proxy", below.uri, "--overlay", *options) as proxy,
    ):
        with proxy.client() as client:
            assert client.block_sizes == (1, 4096, 32 * MIB)
            client.write(1024, b"A" * 512)
            client.write(33 * MIB + 512, b"B" * 1024)
            read = client.read(512, 32 * MIB)
            assert read == data[512:1024] + b"A" * 512 + data[1536 : 32 * MIB + 512]
            read = client.read(33 * MIB, 2048)
            assert read == data[:512] + b"B" * 1024 + data[:512]
        assert proxy.stop() == 0
    assert big.read_bytes() == data


ERRORS = {"EPERM": 1, "EIO": 5, "ENOMEM": 12, "EINVAL": 22, "ENOSPC": 28}


@pytest.mark.parametrize("error", ERRORS)
def test_error_numbers_come_up_as_they_are(image: Path, tmp_path: Path, error: str) -> None:
    """And what failed below has failed in the recording; what follows goes well."""
    switch = tmp_path / "on"
    rates = [f"error-{what}-rate=100%" for what in ("pwrite", "trim", "zero", "cache")]
    options = ("file", str(image), f"error={error}", f"error-file={switch}", *rates)
    with (
        nbdkit(tmp_path, "--filter=error", *options) as below,
        Proxy(tmp_path / "proxy", below.uri, "--record", tmp_path / "run") as proxy,
    ):
        with proxy.client() as client:
            ops = [Op(WRITE, 0, data=b"A" * 512), Op(TRIM, 0, 512), Op(ZERO, 0, 512), Op(5, 0, 512)]
            switch.touch()
            assert [reply.error for reply in client.do(*ops)] == [ERRORS[error]] * 4
            switch.unlink()
            assert [reply.error for reply in client.do(*ops)] == [0] * 4
        assert proxy.stop() == 0
    told = [error for *_, error in requests(tmp_path / "run")]
    assert told == [error] * 3 + [None] * 3


def test_an_errors_text_comes_up_with_it(tmp_path: Path) -> None:
    """EOVERFLOW and ENOTSUP, too, which no real server here would tell."""
    numbers = [1, 5, 12, 22, 28, 75, 95]

    def script(peer: Peer) -> None:
        peer.open(MIB)
        while True:
            asked = peer.request()
            if asked.command in {READ, WRITE}:
                peer.fail(asked, numbers[asked.offset // 512], f"no luck with {asked.offset}: Ü")
            else:
                peer.serve(asked)

    with Scripted(tmp_path, script) as below, Proxy(tmp_path / "proxy", below.uri) as proxy:
        with RawClient(proxy.uri) as client:
            client.open_structured()
            for place, number in enumerate(numbers):
                for op in (Op(READ, place * 512, 512), Op(WRITE, place * 512, 512, b"A" * 512)):
                    error, text = client.error_of(op)
                    assert error == number
                    assert f"no luck with {place * 512}:" in text
        assert proxy.stop() == 0


def test_flags_go_down_as_they_came(image: Path, tmp_path: Path) -> None:
    """The lower proxy's recording is the upper one's, FUA, NO_HOLE, FLUSH and all."""
    upper, lower = tmp_path / "upper-run", tmp_path / "lower-run"
    with Proxy(tmp_path / "lower", image, "--record", lower) as below:
        with Proxy(tmp_path / "upper", below.uri, "--record", upper) as proxy:
            with proxy.client() as client:
                client.write(0, b"A" * 512)
                client.write(512, b"B" * 512, FUA)
                client.flush()
                client.zero(4096, 4096, FUA | NO_HOLE)
                client.zero(8192, 4096, NO_HOLE)
                client.zero(16384, 4096)
                client.trim(65536, 4096, FUA)
                client.trim(65536, 8192)
                client.flush()
            assert proxy.stop() == 0
        assert below.stop() == 0
    asked = requests(upper)
    assert [one[:2] for one in asked] == [
        *(("write", []), ("write", ["FUA"]), ("flush", [])),
        *(("write-zeroes", ["FUA", "NO_HOLE"]), ("write-zeroes", ["NO_HOLE"])),
        *(("write-zeroes", []), ("trim", ["FUA"]), ("trim", []), ("flush", [])),
    ]
    got = requests(lower)
    assert got[: len(asked)] == asked
    assert got[len(asked) :] == [("flush", [], None, None, None)], "the orderly end's own"
    assert image.read_bytes() == state(upper, image) == state(lower, image)

"""Real clients against `nbdproxy serve`, each with and without a recording.

qemu-io, qemu-img, nbdinfo, nbdcopy and fio. Whatever a client wrote stands in the image afterwards,
byte for byte, and the recording's last state is the image.

Not covered: guests and the kernel's client (tests/lab), nbdsh (test_nbdsh), other servers as our
clients (test_servers_as_clients).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.serving import Server, nbdproxy, tool

MIB = 1 << 20
Serve = Callable[..., Server]


@pytest.fixture(params=[False, True], ids=["plain", "recorded"])
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serve]:
    """Serve an image; afterwards the recording, if there is one, must describe it exactly."""
    run = tmp_path / "run"
    served: list[Path] = []

    def start(image: Path, *options: str | Path) -> Server:
        served.append(image)
        return Server(image, *options, *(("--record", run) if request.param else ()))

    yield start
    if request.param:
        nbdproxy("info", run, "--verify")
        nbdproxy("open", run, "--at", "end", "-o", tmp_path / "state")
        assert (tmp_path / "state").read_bytes() == served[0].read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in the first half, a hole behind it."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    with path.open("r+b") as file:
        file.truncate(8 * MIB)
    return path


def qemu_io(uri: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    told = tool("qemu-io", "-f", "raw", *words, uri)
    assert "rror" not in told, told
    assert "failed" not in told, told
    return told


def test_qemu_io_writes_reads_zeroes_discards_and_flushes(serve: Serve, image: Path) -> None:
    expected = bytearray(image.read_bytes())
    expected[0:65536] = b"\xa1" * 65536
    expected[MIB : MIB + 4096] = b"\xa2" * 4096
    expected[2 * MIB : 3 * MIB] = bytes(MIB)
    expected[3 * MIB : 3 * MIB + 65536] = bytes(65536)
    expected[7 * MIB :] = b"\xa3" * MIB
    with serve(image) as server:
        qemu_io(
            server.uri,
            "write -P 0xa1 0 64k",
            "write -f -P 0xa2 1M 4k",
            "write -z 2M 1M",
            "discard 3M 64k",
            "write -P 0xa3 7M 1M",
            "flush",
            "read -P 0xa1 0 64k",
            "read -P 0xa2 1M 4k",
            "read -P 0 2M 1M",
            "read -P 0 3M 64k",
            "read -P 0xa3 7M 1M",
            "read -P 0 5M 1M",
        )
        assert server.stop() == 0
    assert image.read_bytes() == expected


def test_qemu_io_survives_unaligned_requests(serve: Serve, image: Path) -> None:
    """QEMU sends them as they are, because 1 is the smallest block."""
    expected = bytearray(image.read_bytes())
    expected[1000:1077] = b"\x55" * 77
    with serve(image) as server:
        qemu_io(server.uri, "write -P 0x55 1000 77", "read -P 0x55 1000 77", "flush")
        assert server.stop() == 0
    assert image.read_bytes() == expected


def test_qemu_img_sees_a_raw_disk_of_the_right_size(serve: Serve, image: Path) -> None:
    with serve(image) as server:
        facts = json.loads(tool("qemu-img", "info", "--output=json", server.uri))
        assert facts["format"] == "raw"
        assert facts["virtual-size"] == 8 * MIB


def test_qemu_img_converts_out_of_it(serve: Serve, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.qcow2"
    with serve(image) as server:
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri, out)
        assert "identical" in tool("qemu-img", "compare", server.uri, out)
        assert server.stop() == 0
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, out)


def test_qemu_img_converts_into_it(serve: Serve, image: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB) + random.Random(2).randbytes(5 * MIB) + bytes(2 * MIB))
    with serve(image) as server:
        tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.uri)
        assert "identical" in tool("qemu-img", "compare", "-f", "raw", server.uri, source)
        assert server.stop() == 0
    assert image.read_bytes() == source.read_bytes()


def test_nbdinfo_is_told_what_the_export_can_do(serve: Serve, image: Path) -> None:
    with serve(image, "--export", "disk one") as server:
        told = json.loads(tool("nbdinfo", "--json", server.uri))
        (export,) = told["exports"]
        assert told["protocol"] == "newstyle-fixed"
        assert export["export-name"] == "disk one"
        assert export["export-size"] == 8 * MIB
        assert export["uri"] == server.uri
        assert "image through nbdproxy" in export["description"]
        assert export["is_read_only"] is False
        able = [name for name in export if name.startswith("can_")]
        assert [name for name in able if not export[name]] == []
        assert {"can_cache", "can_df", "can_fast_zero", "can_multi_conn"} <= set(able)
        assert told["structured"] or told["extended"]
        assert export["contexts"] == ["base:allocation"]
        sizes = ["block_size_minimum", "block_size_preferred", "block_size_maximum"]
        assert [export[name] for name in sizes] == [1, 4096, 32 * MIB]


def test_nbdinfo_maps_the_holes_of_the_file(serve: Serve, image: Path) -> None:
    """Byte for byte what SEEK_DATA and SEEK_HOLE say, here of data, a hole, and data again."""
    with image.open("r+b") as file:
        file.seek(6 * MIB)
        file.write(b"x" * 4096)
    found, fd = [], os.open(image, os.O_RDONLY)
    at = 0
    while at < 8 * MIB:
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        if hole > at:
            found.append((at, hole - at, 0))
        try:
            data = os.lseek(fd, hole, os.SEEK_DATA)
        except OSError:
            data = 8 * MIB
        if data > hole:
            found.append((hole, data - hole, 3))
        at = data
    os.close(fd)
    assert len(found) == 4, "the filesystem keeps holes"
    with serve(image) as server:
        told = json.loads(tool("nbdinfo", "--map", "--json", server.uri))
        assert server.stop() == 0
    assert [(one["offset"], one["length"], one["type"]) for one in told] == found


def test_nbdinfo_lists_the_export(serve: Serve, image: Path) -> None:
    with serve(image, "--export", "disk1") as server:
        told = json.loads(tool("nbdinfo", "--list", "--json", server.uri))
        assert [export["export-name"] for export in told["exports"]] == ["disk1"]


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_goes_in_and_out_byte_by_byte(
    serve: Serve, image: Path, tmp_path: Path, connections: int
) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(random.Random(3).randbytes(6 * MIB) + bytes(2 * MIB))
    options = [f"--connections={connections}", "--requests=16"]
    with serve(image) as server:
        tool("nbdcopy", *options, "--flush", source, server.uri)
        tool("nbdcopy", *options, server.uri, back)
        assert server.stop() == 0
    assert image.read_bytes() == source.read_bytes() == back.read_bytes()


@pytest.mark.parametrize("block", ["4k", "64k", "1M"])
def test_fio_verifies_what_it_wrote(serve: Serve, image: Path, tmp_path: Path, block: str) -> None:
    with serve(image) as server:
        tool(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite"),
            *(f"--bs={block}", "--iodepth=16", "--fsync=32", "--size=8M", "--randseed=7"),
            *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", f"--aux-path={tmp_path}"),
        )
        assert server.stop() == 0


def test_fio_verifies_under_a_held_cache(image: Path, tmp_path: Path) -> None:
    """Reads must see what is held, and what lands meanwhile."""
    with Server(image, "--policy", "drop-unflushed", "--record", tmp_path / "run") as server:
        tool(
            *("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite"),
            *("--bsrange=4k-256k", "--iodepth=16", "--fsync=32", "--size=8M", "--randseed=7"),
            *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", f"--aux-path={tmp_path}"),
        )
        assert server.stop() == 0

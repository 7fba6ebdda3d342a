"""Which cache mode a recording can have been taken under, seen with real servers and clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.lower import nbdkit
from tests.support.serving import Server, nbdproxy, tool

MIB = 1 << 20


def info(run: Path) -> Any:
    return json.loads(nbdproxy("info", run, "--json").stdout)


def synced_writes(server: Server) -> None:
    with server.client() as client:
        for number in range(20):
            client.write(number * 4096, bytes([number + 1]) * 4096)
            client.flush()


def test_a_program_that_syncs_each_write_is_not_taken_for_writethrough(tmp_path: Path) -> None:
    image, run = tmp_path / "image", tmp_path / "run"
    image.write_bytes(bytes(MIB))
    with Server(image, "--record", run) as server:
        synced_writes(server)
        assert server.stop() == 0
    assert info(run)["recorded_under"] == ["none", "unsafe", "writeback"]
    said = nbdproxy("info", run).stdout
    assert "cache mode  one of none, writeback, unsafe" in said


def test_where_the_server_below_has_no_fua_it_cannot_be_told(tmp_path: Path) -> None:
    below = nbdkit(tmp_path, "--filter=fua", "memory", "1M")
    run = tmp_path / "run"
    with below, Server(Path(below.uri), "--record", run) as server:
        synced_writes(server)
        assert server.stop() == 0
    assert len(info(run)["recorded_under"]) == 5
    assert (
        "cache mode  cannot be told: it has a flush for each write" in nbdproxy("info", run).stdout
    )


def test_qemus_own_writethrough_is_seen_by_its_fua(tmp_path: Path) -> None:
    image, run = tmp_path / "image", tmp_path / "run"
    image.write_bytes(bytes(MIB))
    with Server(image, "--record", run) as server:
        writes = [word for n in range(9) for word in ("-c", f"write {n * 4096} 4096")]
        tool("qemu-io", "-f", "raw", "-t", "writethrough", *writes, server.uri)
        assert server.stop() == 0
    assert info(run)["requests"]["write"]["fua"] == 9
    assert len(info(run)["recorded_under"]) == 5
    assert "every write carries FUA" in nbdproxy("info", run).stdout


def qcow2(path: Path) -> Path:
    """A qcow2 file with room, as it cannot grow over NBD."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        file.truncate(4 * MIB)
    return path


def test_below_qcow2_writethrough_shows_by_no_fua_and_cannot_be_told(tmp_path: Path) -> None:
    image, run = qcow2(tmp_path / "image"), tmp_path / "run"
    with Server(image, "--format", "raw", "--record", run) as server:
        writes = [word for n in range(9) for word in ("-c", f"write {n * 65536} 4096")]
        tool("qemu-io", "-f", "qcow2", "-t", "writethrough", *writes, server.uri)
        assert server.stop() == 0
    found = info(run)
    assert found["requests"]["write"]["fua"] == 0
    assert len(found["recorded_under"]) == 5
    assert "cannot be told: below qcow2" in nbdproxy("info", run).stdout


def test_above_qcow2_it_is_said_what_the_table_lacks(tmp_path: Path) -> None:
    image, run = qcow2(tmp_path / "image"), tmp_path / "run"
    with Server(image, "--format", "qcow2", "--record", run) as server:
        with server.client() as client:
            client.write(0, b"a" * 4096)
            client.write(4096, b"b" * 4096)
        assert server.stop() == 0
    assert "recorded above qcow2: a QEMU that is killed" in nbdproxy("info", run).stdout

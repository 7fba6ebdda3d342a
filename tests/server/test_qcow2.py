"""qcow2 files both ways: the guest's disk in one, through QEMU's storage daemon, and below one.

Not covered: encrypted files, internal snapshots, and formats other than qcow2.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.lower import is_running
from tests.support.nbd_client import FUA, READ_ONLY, NbdError
from tests.support.proxies import MIB, Proxy
from tests.support.recordings import state
from tests.support.serving import COMMAND, Server, nbdproxy, tool, until

SIZE = 4 * MIB
QCOW2 = ("--format", "qcow2")


@pytest.fixture
def content() -> bytes:
    """What a guest has on the disk."""
    return random.Random(1).randbytes(MIB) + bytes(SIZE - MIB)


@pytest.fixture
def image(tmp_path: Path, content: bytes) -> Path:
    """The same in a qcow2 file."""
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(content)
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def guests(image: Path) -> bytes:
    """What a guest sees of a qcow2 file, which must be in order."""
    assert "No errors were found" in tool("qemu-img", "check", image)
    out = image.with_suffix(".out")
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, out)
    return out.read_bytes()


def daemons(pid: int) -> list[int]:
    """The child processes of a proxy."""
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(word) for word in words]


def test_the_guests_disk_goes_in_and_out_byte_by_byte(
    image: Path, content: bytes, tmp_path: Path
) -> None:
    source, back, run = tmp_path / "source", tmp_path / "back", tmp_path / "run"
    source.write_bytes(bytes(MIB) + random.Random(2).randbytes(MIB) + bytes(2 * MIB))
    with Proxy(tmp_path / "proxy", image, *QCOW2, "--record", run) as proxy:
        told = json.loads(tool("nbdinfo", "--json", proxy.uri))["exports"][0]
        assert told["export-size"] == SIZE
        assert "disk.qcow2 through nbdproxy" in told["description"]
        tool("nbdcopy", "--connections=4", proxy.uri, back)
        assert back.read_bytes() == content
        tool("nbdcopy", "--connections=4", "--flush", source, proxy.uri)
        assert proxy.stop() == 0
    assert guests(image) == source.read_bytes()
    assert state(run, tmp_path / "raw") == source.read_bytes()


def test_what_a_client_wrote_is_in_the_file_after_a_signal(
    image: Path, content: bytes, tmp_path: Path
) -> None:
    with Proxy(tmp_path / "proxy", image, *QCOW2) as proxy:
        client = proxy.client()
        client.write(MIB - 512, b"A" * 1024)
        client.zero(0, 65536)
        client.trim(65536, 65536)
        assert proxy.stop() == 0
        client.drop()
    expected = bytes(2 * 65536) + content[131072 : MIB - 512] + b"A" * 1024
    assert guests(image) == expected + bytes(SIZE - MIB - 512)


def test_unflushed_writes_are_dropped(image: Path, content: bytes, tmp_path: Path) -> None:
    options = ("--policy", "drop-unflushed", "--record", tmp_path / "run")
    with Proxy(tmp_path / "proxy", image, *QCOW2, *options) as proxy:
        with proxy.client() as client:
            client.write(2 * MIB, b"A" * 4096)
            client.flush()
            client.write(0, b"B" * 4096)
            client.write(4096, b"C" * 512, FUA)
        assert proxy.stop() == 0
    expected = bytearray(content)
    expected[2 * MIB : 2 * MIB + 4096] = b"A" * 4096
    expected[4096:4608] = b"C" * 512
    assert guests(image) == expected
    power_loss = ("--mode", "none", "--failure", "host-power-loss")
    assert state(tmp_path / "run", tmp_path / "raw", *power_loss) == expected


def test_only_the_top_of_a_chain_is_written(image: Path, content: bytes, tmp_path: Path) -> None:
    """The backing file is named by a relative path, as `qemu-img create -b` writes it."""
    top, before = tmp_path / "top.qcow2", image.read_bytes()
    tool("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", image.name, top)
    with Proxy(tmp_path / "proxy", top, *QCOW2) as proxy:
        with proxy.client() as client:
            assert client.read(0, SIZE) == content
            client.write(512, b"A" * 512)
            client.zero(65536, 65536)
        assert proxy.stop() == 0
    expected = content[:512] + b"A" * 512 + content[1024:65536] + bytes(65536) + content[131072:]
    assert guests(top) == expected
    assert image.read_bytes() == before


@pytest.mark.parametrize("option", ["--read-only", "--overlay"])
def test_the_file_can_be_left_as_it_is(
    image: Path, content: bytes, tmp_path: Path, option: str
) -> None:
    before = image.read_bytes()
    with Proxy(tmp_path / "proxy", image, *QCOW2, option) as proxy:
        with proxy.client() as client:
            if option == "--read-only":
                assert client.flags & READ_ONLY
                with pytest.raises(NbdError):
                    client.write(0, b"A" * 512)
            else:
                client.write(0, b"A" * 512)
                client.flush()
                assert client.read(0, 512) == b"A" * 512
            assert client.read(512, SIZE - 512) == content[512:]
        assert proxy.stop() == 0
    assert image.read_bytes() == before


def test_read_only_it_can_be_served_twice_at_once(image: Path, tmp_path: Path) -> None:
    with (
        Proxy(tmp_path / "one", image, *QCOW2, "--read-only") as first,
        Proxy(tmp_path / "two", image, *QCOW2, "--overlay") as second,
    ):
        assert first.client().read(0, SIZE) == second.client().read(0, SIZE)


def told(*words: str | Path) -> str:
    """The one sentence with which `serve` refuses."""
    said = nbdproxy("serve", *words, "--run", "true", code=2).stderr
    assert said.startswith("nbdproxy: ")
    assert said.count("\n") == 1, said
    return said


def test_without_a_format_both_ways_are_explained(image: Path) -> None:
    said = told(image)
    assert "--format qcow2 to serve the guest's disk in it" in said
    assert "--format raw to stand below it" in said


def test_a_file_that_is_no_qcow2_is_refused(image: Path, tmp_path: Path) -> None:
    assert "is not a qcow2 file" in told(tmp_path / "raw", *QCOW2)
    assert "there is no image at" in told(tmp_path / "nothing", *QCOW2)


@pytest.mark.parametrize("at", [4, 100])
def test_a_damaged_file_is_refused_with_qemus_reason(image: Path, at: int) -> None:
    """A version that nobody knows, and a header that is all wrong."""
    damaged = bytearray(image.read_bytes())
    damaged[at : at + 64] = b"\xff" * 64
    image.write_bytes(damaged)
    assert "cannot be opened by qemu-storage-daemon: " in told(image, *QCOW2)
    assert image.read_bytes() == damaged


def test_a_missing_backing_file_is_told(image: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", image.name, top)
    image.unlink()
    assert "disk.qcow2" in told(top, *QCOW2).replace(str(tmp_path), "")


def test_a_file_in_use_is_refused(image: Path, tmp_path: Path) -> None:
    with Proxy(tmp_path / "proxy", image, *QCOW2) as proxy:
        assert "is in use by another nbdproxy" in told(image, *QCOW2)
        with proxy.client() as client:
            client.write(0, b"A" * 512)


def test_a_missing_daemon_is_told_with_its_package(image: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "serve", str(image), *QCOW2, "--run", "true"],
        env={**os.environ, "PATH": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "qemu-storage-daemon is not installed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_daemon_outlives_an_nbdproxy_that_was_killed(image: Path, tmp_path: Path) -> None:
    with Proxy(tmp_path / "proxy", image, *QCOW2) as proxy:
        with proxy.client() as client:
            client.write(0, b"A" * 512)
            client.flush()
        (daemon,) = daemons(proxy.pid)
        proxy.kill()
        until(lambda: not is_running(daemon), "the daemon has ended, too")
    assert guests(image)[:512] == b"A" * 512


def test_a_daemon_that_dies_is_the_end(image: Path, tmp_path: Path) -> None:
    with Proxy(tmp_path / "proxy", image, *QCOW2, "--record", tmp_path / "run") as proxy:
        with proxy.client() as client:
            client.write(0, b"A" * 512)
        (daemon,) = daemons(proxy.pid)
        os.kill(daemon, signal.SIGKILL)
        assert proxy.wait() == 2
        assert f"the qemu-storage-daemon that reads {image} for nbdproxy is lost" in proxy.sentence
    assert "is lost" in nbdproxy("info", tmp_path / "run").stdout


def test_ctrl_c_ends_in_order(image: Path, content: bytes, tmp_path: Path) -> None:
    """A terminal's Ctrl-C is for the whole process group, but the daemon has one of its own."""
    words = ("setsid", *COMMAND)
    with Server(image, *QCOW2, "--record", tmp_path / "run", command=words) as server:
        client = server.client()
        for turn in range(32):
            client.write(SIZE - (turn + 1) * 65536, b"A" * 65536)
        (daemon,) = daemons(server.process.pid)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.wait() == 0
        assert not is_running(daemon)
        assert "Traceback" not in server.stderr
        client.drop()
    assert guests(image) == content[: 2 * MIB] + b"A" * (2 * MIB)
    assert "ended by SIGINT" in nbdproxy("info", tmp_path / "run").stdout


def test_below_a_qcow2_file_qemu_keeps_it_in_order(
    image: Path, content: bytes, tmp_path: Path
) -> None:
    """QEMU opens the format over NBD, and nbdproxy serves the file's bytes, which cannot grow."""
    with image.open("r+b") as file:
        file.truncate(8 * MIB)
    base = tmp_path / "base"
    base.write_bytes(image.read_bytes())
    with Proxy(tmp_path / "proxy", image, "--format", "raw", "--record", tmp_path / "run") as proxy:
        node = f"driver=qcow2,file.driver=nbd,file.server.type=unix,file.server.path={proxy.socket}"
        commands = ("write -P 65 2M 64k", "write -z 0 64k", "discard 64k 64k", "flush")
        words = [word for command in commands for word in ("-c", command)]
        told = tool("qemu-io", "--image-opts", "-d", "unmap", *words, node)
        assert "failed" not in told
        assert "No errors were found" in tool("qemu-img", "check", "--image-opts", node)
        assert proxy.stop() == 0
    expected = bytearray(content)
    expected[2 * MIB : 2 * MIB + 65536] = b"A" * 65536
    expected[:131072] = bytes(131072)
    assert guests(image) == expected
    assert state(tmp_path / "run", image) == image.read_bytes()

"""Other servers as our clients: nbdkit's nbd plugin and qemu-storage-daemon, and nbd-client's list.

What goes in at the top of such a chain is on our image, and what our image has comes out. Not
covered: what a chain the other way round does, with us on top (tests/server/test_upstream.py).
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.serving import DEADLINE_S, Server, tool, until

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in the first half, a hole behind it."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(2 * MIB))
    with path.open("r+b") as file:
        file.truncate(4 * MIB)
    return path


@contextmanager
def running(socket: Path, *words: str | Path) -> Iterator[str]:
    """Run a server until the block ends; yields its URI."""
    process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL)
    try:
        until(lambda: socket.exists() or process.poll() is not None, f"{words[0]} listens")
        assert process.poll() is None, f"{words[0]} did not start"
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def assert_passes_through(uri: str, image: Path, folder: Path) -> None:
    """Out, in, zeroes and holes, through whatever stands in between."""
    out = folder / "out"
    tool("nbdcopy", "--connections=4", uri, out)
    assert out.read_bytes() == image.read_bytes()
    mapped = json.loads(tool("nbdinfo", "--map", "--json", uri))
    assert [(e["offset"], e["length"], e["type"]) for e in mapped] == [
        (0, 2 * MIB, 0),
        (2 * MIB, 2 * MIB, 3),
    ]
    source = folder / "source"
    source.write_bytes(random.Random(2).randbytes(MIB) + bytes(2 * MIB) + b"z" * MIB)
    tool("nbdcopy", "--flush", "--destination-is-zero", "--connections=1", source, uri, code=0)
    tool("qemu-io", "-f", "raw", "-c", f"write -z {MIB} {2 * MIB}", "-c", "flush", uri)
    assert image.read_bytes() == source.read_bytes()


def test_nbdkits_client_passes_through(image: Path, tmp_path: Path) -> None:
    top = tmp_path / "top"
    with (
        Server(image) as server,
        running(top, "nbdkit", "-f", "-U", top, "nbd", f"uri={server.uri}", "shared=true") as uri,
    ):
        assert_passes_through(uri, image, tmp_path)


def test_qemu_storage_daemons_client_passes_through(image: Path, tmp_path: Path) -> None:
    top, bottom = tmp_path / "top", tmp_path / "bottom"
    node = f"driver=nbd,node-name=n,server.type=unix,server.path={bottom},discard=unmap"
    with (
        Server(image, "--socket", bottom),
        running(
            top,
            *("qemu-storage-daemon", "--blockdev", node),
            *("--nbd-server", f"addr.type=unix,addr.path={top},max-connections=0"),
            *("--export", "type=nbd,id=e,node-name=n,name=,writable=on"),
        ) as uri,
    ):
        assert_passes_through(uri, image, tmp_path)


def test_nbd_client_lists_the_exports(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(MIB))
    exports = ("--export", "first", "--export", "second")
    with Server(image, other, "--listen", "127.0.0.1:0", *exports) as server:
        port = server.uri.rpartition(":")[2].partition("/")[0]
        listed = tool("nbd-client", "-l", "127.0.0.1", port)
    assert [line for line in listed.splitlines() if "through" in line] == [
        "first: image through nbdproxy (passthrough)",
        "second: other through nbdproxy (passthrough)",
    ]

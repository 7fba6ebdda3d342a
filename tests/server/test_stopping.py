"""The end: what comes too late is answered with ESHUTDOWN, and who is ended has not left.

The first is a session of the real server on a socket pair, so that "stop" and "a request is
there" happen at one instant. Not covered: cuts of the power, which answer nothing (tests/laws).
"""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
from pathlib import Path

import trio

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.policy.loader import load
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.export_provider import FixedExports
from nbdproxy.server.front.session import Session
from tests.nbd.wire import FLAGS, go, request
from tests.support.nbd_client import READ, WRITE
from tests.support.serving import COMMAND, DEADLINE_S, Server, nbdproxy

ESHUTDOWN = 108


def test_requests_that_came_too_late_are_told_so() -> None:
    disk = MemoryDisk(4096)
    replies = b""

    async def main() -> None:
        nonlocal replies
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        export = Export("", ImageStore(disk), load("passthrough").policy)
        session = Session(ours, 1, "test", FixedExports([export]), power=export.power)
        client = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            with trio.fail_after(10):
                await client.send_all(FLAGS + go() + request(READ, 0, 512))
                heard = b""
                while len(heard) < 512 or not heard.endswith(bytes(512)):
                    heard += await client.receive_some()
            late = request(WRITE, 0, 512, cookie=1, payload=b"x" * 512) + request(READ, 0, 512)
            theirs.send(late)
            session.stop_reading()
            async for data in client:
                replies += data
        await client.aclose()

    trio.run(main)
    # Simple replies: magic, error, cookie; a failed READ has no data.
    expected = [struct.pack(">IIQ", 0x67446698, ESHUTDOWN, cookie) for cookie in (1, 7)]
    assert replies == b"".join(expected)
    assert disk.pread(0, 4096) == bytes(4096)


DISCONNECT_CUTS = """
summary = "A power cut when the client leaves"
imitates = "A test"

[cache]
holds = true

[cut]
at = ["disconnect"]

[[example]]
do = ["write 0 A", "disconnect"]
image = ["-"]
"""


def test_a_client_that_we_end_has_not_left(tmp_path: Path) -> None:
    """Ended by a signal, a policy that cuts when the client leaves keeps what was written."""
    image, policy, run = tmp_path / "image", tmp_path / "policy.toml", tmp_path / "run"
    image.write_bytes(bytes(4096))
    policy.write_text(DISCONNECT_CUTS)
    with Server(image, "--policy", policy, "--record", run) as server:
        client = server.client()
        client.write(0, b"A" * 512)
        assert server.stop() == 0
        client.sock.close()
    assert image.read_bytes() == b"A" * 512 + bytes(3584)
    assert "cut" not in nbdproxy("log", run).stdout


def test_a_signal_while_the_upstream_is_silent_leaves_nothing_behind(tmp_path: Path) -> None:
    """It comes before there is anything to serve: no folder, no socket, one sentence at most."""
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    silent.bind(str(tmp_path / "silent"))
    silent.listen()
    words = (*COMMAND, "serve", f"nbd+unix:///?socket={tmp_path}/silent", "--socket", "own")
    with silent, subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in said
    assert not (tmp_path / "own").exists()

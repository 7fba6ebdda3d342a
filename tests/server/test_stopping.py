"""What comes when the server is stopping is answered with ESHUTDOWN, and changes nothing.

A session of the real server on a socket pair, so that "stop" and "a request is there" happen at
one instant. Not covered: cuts of the power, which answer nothing (tests/laws).
"""

from __future__ import annotations

import socket
import struct

import trio

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.policy.loader import load
from nbdproxy.server.export import Export
from nbdproxy.server.session import Session
from tests.nbd.wire import FLAGS, go, request
from tests.support.nbd_client import READ, WRITE

ESHUTDOWN = 108


def test_requests_that_came_too_late_are_told_so() -> None:
    disk = MemoryDisk(4096)
    replies = b""

    async def main() -> None:
        nonlocal replies
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        export = Export("", disk, load("passthrough").policy)
        session = Session(ours, 1, "test", {"": export}, power=export.power)
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

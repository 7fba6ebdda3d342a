"""Changes that wait beside the event loop: their places are given back, whoever does not read.

Sessions of the real server on socket pairs, over a disk that cannot zero quickly. Not covered:
the order of overlapping changes through an upstream (test_upstream_work).
"""

from __future__ import annotations

import errno
import socket

import trio
import trio.testing

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.policy.loader import load
from nbdproxy.requests import Command, Request
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.export.jobs import Claims
from nbdproxy.server.front.export_provider import FixedExports
from nbdproxy.server.front.session import Session
from tests.nbd.wire import FLAGS, go, request
from tests.support.nbd_client import READ, WRITE, ZERO

MIB = 1 << 20


class SlowZeroes(MemoryDisk):
    """A disk on which zeroes have to be written."""

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        if fast:
            raise OSError(errno.EOPNOTSUPP, "not fast")
        super().zero(offset, length, may_punch=may_punch)


def change(offset: int, length: int) -> Request:
    return Request(Command.WRITE_ZEROES, 0, 1, offset, length, memoryview(b""))


def test_a_claim_waits_for_the_earlier_ones_that_overlap_and_leaves_nothing_behind() -> None:
    claims = Claims()
    turns: list[str] = []

    async def main() -> None:
        first, apart, over = (claims.claim(change(*at)) for at in ((0, 8), (8, 8), (4, 8)))
        assert claims.overlap(change(15, 1))
        assert not claims.overlap(change(16, 1))

        async def wait() -> None:
            await over.wait_turn()
            turns.append("over")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await apart.wait_turn()
            for claim in (first, apart):
                await trio.testing.wait_all_tasks_blocked()
                assert not turns
                claim.release()
        over.release()
        over.release()

    trio.run(main)
    assert turns == ["over"]
    assert not claims.overlap(change(0, 1 << 40))


def test_a_client_that_reads_nothing_keeps_no_place_from_others() -> None:
    disk = SlowZeroes(16 * MIB)

    async def main() -> None:
        export = Export("", ImageStore(disk), load("passthrough").policy)

        async def connect(nursery: trio.Nursery) -> trio.SocketStream:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            session = Session(ours, 1, "test", FixedExports([export]), power=export.power)
            nursery.start_soon(session.run)
            client = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
            await client.send_all(FLAGS + go())
            return client

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                deaf, other = await connect(nursery), await connect(nursery)
                reads = b"".join(request(READ, at * MIB, MIB) for at in range(7))
                await deaf.send_all(reads + request(ZERO, 0, 4096))
                await trio.testing.wait_all_tasks_blocked(0.05)
                await other.send_all(request(WRITE, 0, 512, cookie=5, payload=b"x" * 512))
                heard = b""
                while not heard.endswith((5).to_bytes(8)):
                    heard += await other.receive_some()
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert disk.pread(0, 512) == b"x" * 512

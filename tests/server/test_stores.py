"""The stores by themselves: each is a bytearray, tried at once or awaited, with faults or without.

Each is made of real parts: files, a recording, another server on a Unix socket. Not covered: which
flushes cover what (tests/laws/test_disks.py, tests/laws/test_cut_policies.py), and what an export
does with what a store tells (test_policy_changes.py).
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.dice import DrawKey
from nbdproxy.disks.device import BlockDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import RecordingError
from nbdproxy.extents import ExtentSet
from nbdproxy.nbd import uri as nbd_uri
from nbdproxy.policy.compose import load_all
from nbdproxy.policy.engine import Decision
from nbdproxy.policy.loader import read
from nbdproxy.policy.model import Policy
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.requests import Command, CommandFlag, NbdErrno, Request
from nbdproxy.server.below.cached_store import CachedStore
from nbdproxy.server.below.copy_before_write import CopyBeforeWriteStore, PreservingDisk
from nbdproxy.server.below.failures import NOT_SAVED, RequestFailure, ToldError
from nbdproxy.server.below.faulty_store import FaultyStore
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.below.remote_store import RemoteStore
from nbdproxy.server.below.store import Store
from nbdproxy.server.below.upstream import connected
from nbdproxy.server.below.upstream_disk import UpstreamDisk
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.export_provider import FixedExports
from nbdproxy.server.shared.power import Power
from nbdproxy.state_server.background import ThreadedServer

SECTOR = 512
SECTORS = 24
SIZE = SECTORS * SECTOR
CONTENT = bytes(4 * SECTOR) + bytes(range(256)) * 16 + bytes(12 * SECTOR)


def image_of(folder: Path) -> Path:
    path = folder / "image"
    path.write_bytes(CONTENT)
    return path


def no_failure(error: RecordingError) -> None:
    raise error


def cache_over(disk: BlockDevice, policy: str, power: Power) -> CachedStore:
    return CachedStore(disk, load_all([policy]), power, metadata=ExtentSet(), fail=no_failure)


@asynccontextmanager
async def image(folder: Path) -> AsyncIterator[Store]:
    disk = FileDisk(image_of(folder))
    yield ImageStore(disk)
    disk.close()


@asynccontextmanager
async def overlay(folder: Path) -> AsyncIterator[Store]:
    disk = OverlayDisk(FileDisk(image_of(folder), read_only=True))
    yield ImageStore(disk)
    disk.close()
    assert (folder / "image").read_bytes() == CONTENT


@asynccontextmanager
async def cached(folder: Path) -> AsyncIterator[Store]:
    disk = FileDisk(image_of(folder))
    yield cache_over(disk, "gluster-write-behind", Power())
    disk.close()


@asynccontextmanager
async def remote(folder: Path) -> AsyncIterator[Store]:
    disk = FileDisk(image_of(folder))
    exports = FixedExports([Export("", ImageStore(disk), load_all(["passthrough"]))])
    with ThreadedServer(exports) as server:
        async with connected(nbd_uri.parse(server.uri("")), "the server below") as upstream:
            yield RemoteStore(upstream, UpstreamDisk(upstream), Power())
    disk.close()


@asynccontextmanager
async def saved(below: AbstractAsyncContextManager[Store], folder: Path) -> AsyncIterator[Store]:
    """Copy-before-write, whose recording gives back what was there at the start."""
    where = str(folder / "image")
    meta = Meta(SIZE, where, False, ((0, SIZE),), Fingerprint(SIZE, 0), (), "now", "test")
    recorder = RecordingWriter(folder / "run", meta)
    async with below as store:
        yield CopyBeforeWriteStore(store, PreservingDisk(store.disk, recorder))
    recorder.close(Ending("the end", Fingerprint.of(folder / "image")))
    source = RecordedSource(folder / "run")
    base = source.base()
    assert base.pread(0, SIZE) == CONTENT
    base.close()
    source.close()


def saved_image(folder: Path) -> AbstractAsyncContextManager[Store]:
    return saved(image(folder), folder)


def saved_remote(folder: Path) -> AbstractAsyncContextManager[Store]:
    return saved(remote(folder), folder)


MakeStore = Callable[[Path], AbstractAsyncContextManager[Store]]
STORES: list[MakeStore] = [image, overlay, cached, remote, saved_image, saved_remote]


def faults(folder: Path, *actions: str) -> Policy:
    """A policy with a rule for each of these actions."""
    path = folder / "mine.toml"
    head = 'summary = "s"\nimitates = "i"\n'
    rules = "".join(f'[[rule]]\naction = "{action}"\n' for action in actions)
    path.write_text(head + rules)
    return read(path).policy


def by_rule(policy: Policy, number: int = 0) -> Decision:
    """What a rule of a policy decides."""
    rule = policy.rules[number]
    return Decision(rule.action, DrawKey(0, rule.name, 1))


def write(sector: int, data: bytes, flags: int = 0) -> Request:
    return Request(Command.WRITE, flags, 1, sector * SECTOR, len(data), memoryview(data))


def blank(command: Command, sector: int, count: int, flags: int = 0) -> Request:
    return Request(command, flags, 1, sector * SECTOR, count * SECTOR, memoryview(b""))


async def change(store: Store, request: Request, decision: Decision | None = None) -> None:
    """Do a change beside; what waits for it is told once that it was done."""
    told: list[bool] = []
    await store.change(request, 0, decision, told.append)
    assert told == [True]


async def shown(store: Store, offset: int = 0, length: int = SIZE) -> bytes:
    """What reads show; if they can be had at once, that is the same."""
    found, at_once = bytearray(length), bytearray(length)
    await store.read(offset, memoryview(found), None)
    if store.try_read(offset, memoryview(at_once)):
        assert at_once == found
    return bytes(found)


def run(make: MakeStore, story: Callable[[Store], Awaitable[None]]) -> None:
    """Let a story happen on a store."""

    async def main(folder: Path) -> None:
        async with make(folder) as store:
            await story(store)
            store.close()

    with tempfile.TemporaryDirectory(prefix="nbdproxy-") as name:
        trio.run(main, Path(name))


steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero", "punch", "trim", "sync"]),
        st.integers(0, SECTORS - 1),
        st.integers(1, 8),
        st.integers(1, 255),
        st.booleans(),
    ),
    max_size=12,
)
"""What, first sector and how many, a byte to write, and whether it is tried at once."""


def request_of(what: str, first: int, count: int, byte: int) -> Request:
    count = min(count, SECTORS - first)
    if what == "write":
        return write(first, bytes([byte]) * (count * SECTOR - 1) + b"\x01")
    if what == "trim":
        return blank(Command.TRIM, first, count)
    flags = CommandFlag.NO_HOLE if what == "zero" else 0
    return blank(Command.WRITE_ZEROES, first, count, flags)


@pytest.mark.parametrize("actions", [(), ("lose",), ("stale",)], ids=str)
@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
@given(steps)
@settings(max_examples=12, deadline=None)
def test_a_store_is_a_bytearray_at_once_and_awaited(
    make: MakeStore, actions: tuple[str, ...], todo: list[tuple[str, int, int, int, bool]]
) -> None:
    async def story(store: Store) -> None:
        with tempfile.TemporaryDirectory() as name:
            if actions:
                store = FaultyStore(store, faults(Path(name), *actions))
        reference = bytearray(CONTENT)
        for what, first, count, byte, at_once in todo:
            if what == "sync":
                await store.sync()
                continue
            request = request_of(what, first, count, byte)
            await store.prepare([request])
            if not (at_once and store.try_change(request, 0)):
                await change(store, request)
            after = bytes(request.payload) or bytes(request.length)
            reference[request.offset : request.end] = after
            assert await shown(store, request.offset, request.length) == after
        assert await shown(store) == reference
        at = 0
        for length, flags in await store.status(blank(Command.BLOCK_STATUS, 0, SECTORS)):
            assert not flags or not any(reference[at : at + length])
            at += length
        assert at == SIZE
        store.close()

    run(make, story)


@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_faults_stack_on_each(make: MakeStore, tmp_path: Path) -> None:
    policy = faults(tmp_path, "lose", "stale")
    lost, stale = by_rule(policy), by_rule(policy, 1)

    async def story(store: Store) -> None:
        faulty = FaultyStore(store, policy)
        assert not faulty.try_change(write(8, b"A" * SECTOR), 0)  # what was there is kept
        await change(faulty, write(8, b"A" * SECTOR))
        await change(faulty, write(8, b"B" * SECTOR), lost)
        assert faulty.shown_bytes == SECTOR
        assert await shown(faulty, 8 * SECTOR, SECTOR) == b"A" * SECTOR
        assert await shown(store, 8 * SECTOR, SECTOR) == b"B" * SECTOR
        assert await faulty.status(blank(Command.BLOCK_STATUS, 0, SECTORS)) == [(SIZE, 0)]
        found = memoryview(bytearray(SECTOR))
        await faulty.read(8 * SECTOR, found, stale)
        assert found == b"A" * SECTOR
        assert faulty.lift()
        assert await shown(faulty) == await shown(store)
        assert not store.lift()
        faulty.close()

    run(make, story)


@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_a_write_that_is_done_heals_what_was_lost(make: MakeStore, tmp_path: Path) -> None:
    policy = faults(tmp_path, "lose")

    async def story(store: Store) -> None:
        faulty = FaultyStore(store, policy)
        await change(faulty, write(8, b"A" * 2 * SECTOR), by_rule(policy))
        healing = write(8, b"B" * SECTOR)
        if not faulty.try_change(healing, 0):
            await change(faulty, healing)
        assert faulty.shown_bytes == SECTOR
        there = b"B" * SECTOR + CONTENT[9 * SECTOR : 10 * SECTOR]
        assert await shown(faulty, 8 * SECTOR, 2 * SECTOR) == there
        faulty.close()

    run(make, story)


@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_what_is_promised_is_recorded_once_unless_the_power_went(make: MakeStore) -> None:
    async def story(store: Store) -> None:
        told: list[RequestFailure | None] = []

        def record(failure: RequestFailure | None) -> RequestFailure | None:
            told.append(failure)
            return failure

        if not store.try_change(write(0, b"A" * SECTOR), 0):
            await change(store, write(0, b"A" * SECTOR))
        promises = [store.fua(record), store.flush(store.draw_line(), record, None)]
        failure = RequestFailure(NbdErrno.EIO, "so")
        dropped = store.flush(store.draw_line(), record, failure)
        assert told == []
        assert [await promise() for promise in promises] == [None, None]
        assert await dropped() == failure
        assert told == [None, None, failure]
        late = store.flush(store.draw_line(), record, None)
        store.power.cut("now")
        assert await late() is None
        assert len(told) == 3

    run(make, story)


def test_a_cut_takes_what_a_cache_holds_and_leaves_what_was_flushed() -> None:
    async def main() -> None:
        below = MemoryDisk(CONTENT)
        power = Power()
        store = cache_over(below, "drop-unflushed", power)
        assert store.try_change(write(0, b"A" * SECTOR), 0)
        await store.flush(store.draw_line(), lambda failure: failure, None)()
        assert store.try_change(write(0, b"B" * SECTOR), 1)
        power.cut("now")
        told: list[bool] = []
        await store.change(write(1, b"C" * SECTOR), 2, None, told.append)
        assert told == [False]
        assert await store.settled() == store.held_bytes == SECTOR
        assert await store.leave_survivors() == ""
        assert below.pread(0, 2 * SECTOR) == b"A" * SECTOR + CONTENT[SECTOR : 2 * SECTOR]

    trio.run(main)


def test_a_flush_that_fails_drops_what_a_cache_holds() -> None:
    async def main() -> None:
        below = MemoryDisk(CONTENT)
        store = cache_over(below, "drop-unflushed", Power())
        assert store.try_change(write(0, b"A" * SECTOR), 0)
        failure = RequestFailure(NbdErrno.EIO, "so")
        assert await store.flush(store.draw_line(), lambda one: one, failure)() == failure
        await store.sync()
        assert below.pread(0, SIZE) == CONTENT
        assert await shown(store, 0, SECTOR) == b"A" * SECTOR

    trio.run(main)


class Broken(MemoryDisk):
    """A disk that cannot be written, read at once, or read at all."""

    readable = True

    def try_pread_into(self, _offset: int, _buffer: memoryview) -> bool:
        return False

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        if not self.readable:
            raise OSError(errno.EIO, "no spoon")
        super().pread_into(offset, buffer)

    def pwrite(self, _offset: int, _data: memoryview | bytes) -> None:
        raise OSError(errno.ENOSPC, "no room")

    def zero(self, offset: int, length: int, *, may_punch: bool, fast: bool = False) -> None:
        if fast:
            raise OSError(errno.EOPNOTSUPP, "not fast")
        super().zero(offset, length, may_punch=may_punch)


def test_a_change_that_fails_is_over_and_changes_nothing_that_is_shown(tmp_path: Path) -> None:
    policy = faults(tmp_path, "lose")

    async def main() -> None:
        faulty = FaultyStore(ImageStore(Broken(CONTENT)), policy)
        await change(faulty, blank(Command.TRIM, 4, 1), by_rule(policy))
        before = await shown(faulty)
        told: list[bool] = []
        with pytest.raises(OSError, match="no room"):
            await faulty.change(write(4, b"A" * SECTOR), 0, None, told.append)
        with pytest.raises(OSError, match="no room"):
            faulty.try_change(write(4, b"A" * SECTOR), 0)
        assert told == [False]
        assert await shown(faulty) == before
        faulty.close()

    trio.run(main)


def test_zeroes_that_have_to_be_written_are_not_made_at_once() -> None:
    store = ImageStore(Broken(CONTENT))
    assert not store.try_change(blank(Command.WRITE_ZEROES, 8, 1), 0)
    assert not store.try_change(blank(Command.TRIM, 8, 1), 0)
    with pytest.raises(OSError, match="not fast"):
        store.try_change(blank(Command.WRITE_ZEROES, 8, 1, CommandFlag.FAST_ZERO), 0)
    assert store.disk.pread(0, SIZE) == CONTENT


def test_nothing_is_changed_before_it_is_saved(tmp_path: Path) -> None:
    async def main() -> None:
        disk = Broken(CONTENT)
        meta = Meta(SIZE, "image", False, ((0, SIZE),), Fingerprint(SIZE, 0), (), "now", "test")
        recorder = RecordingWriter(tmp_path / "run", meta)
        store = CopyBeforeWriteStore(ImageStore(disk), PreservingDisk(disk, recorder))
        trim = blank(Command.TRIM, 8, 1)
        assert not store.try_change(trim, 0)  # what is there is not in the page cache
        disk.readable = False
        told: list[bool] = []
        with pytest.raises(OSError, match="no spoon"):
            await store.change(trim, 0, None, told.append)
        assert told == [False]
        disk.readable = True
        assert await shown(store) == CONTENT
        await change(store, trim)
        assert await shown(store, 8 * SECTOR, SECTOR) == bytes(SECTOR)
        recorder.close(Ending("the end", None))

    trio.run(main)


def test_behind_a_server_what_cannot_be_saved_is_refused_in_words() -> None:
    async def story(store: Store) -> None:
        assert isinstance(store, CopyBeforeWriteStore)
        disk = served[-1]
        disk.readable = False
        told: list[bool] = []
        with pytest.raises(ToldError) as refused:
            await store.change(blank(Command.TRIM, 8, 1), 0, None, told.append)
        assert refused.value.failure == NOT_SAVED
        assert told == [False]
        disk.readable = True

    served: list[Broken] = []

    @asynccontextmanager
    async def behind_a_server(folder: Path) -> AsyncIterator[Store]:
        served.append(Broken(CONTENT))
        image_of(folder)
        exports = FixedExports([Export("", ImageStore(served[0]), load_all(["passthrough"]))])
        with ThreadedServer(exports) as server:
            async with connected(nbd_uri.parse(server.uri("")), "the server below") as upstream:
                yield RemoteStore(upstream, UpstreamDisk(upstream), Power())

    run(lambda folder: saved(behind_a_server(folder), folder), story)

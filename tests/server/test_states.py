"""Every state of a made-up recording, asked for by name over NBD."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nbdproxy.crash.explore.crash_space_builder import CrashSpaceBuilder
from nbdproxy.crash.explore.stages import Stages
from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import UsageError
from nbdproxy.extents import Extent
from nbdproxy.persistence.model import Level, Options
from nbdproxy.recording.notes import Note, NoteKind
from nbdproxy.requests import Command
from nbdproxy.state_server.server import StateExports, StateServer, cut_names, state_named
from tests.support.memory_source import MemorySource
from tests.support.nbd_client import NbdClient
from tests.support.persistence_reference import Completed, Received, table_of
from tests.support.serving import tool
from tests.support.shell import nbdsh

SECTOR = 512
SIZE = 8 * SECTOR
LOG: list[Received | Completed] = [
    *(Received(Command.WRITE, 0, 4), Completed(0)),
    *(Received(Command.FLUSH), Completed(2)),
    *(Received(Command.WRITE, 2, 4), Completed(4)),
    *(Received(Command.WRITE, 7, 1), Received(Command.TRIM, 0, 1), Completed(7)),
]
FULL = b"\0" + b"\1" + b"\5" * 4 + b"\xfe" + b"\7"
"""What each sector holds if all was sent."""
DISKS = {
    "end": FULL,
    "flush:1": b"\1" * 4 + b"\xfe" * 4,
    "seq:0": b"\1" * 4 + b"\xfe" * 4,
    "time:6ms": b"\1\1" + b"\5" * 4 + b"\xfe\7",
    "mark:half way": b"\1" * 4 + b"\xfe" * 4,
    "s9.flushed.must": b"\1" * 4 + b"\xfe" * 4,
    "s9.flushed.all": FULL,
    "s9.flushed.but4": b"\0\1\1\1\xfe\xfe\xfe\7",
    "s9.flushed.but4:1-2": b"\0\1\5\1\xfe\5\xfe\7",
    "s9.nothing.only6": b"\xfe" * 7 + b"\7",
    "s0.flushed.must": b"\xfe" * 8,
    "s9.flushed.must~0=7~6-7=base": b"\0\1\1\1\xfe\xfe\xfe\xfe",
}


def make_timeline() -> Timeline:
    payload = b"".join(
        bytes([seq + 1]) * event.count * SECTOR
        for seq, event in enumerate(LOG)
        if isinstance(event, Received) and event.command is Command.WRITE
    )
    notes = [
        Note(3, 3_000_000, NoteKind.MARK, 0, "half way"),
        Note(5, 5_000_000, NoteKind.CONNECT, 1, "mark:no"),
        Note(8, 8_000_000, NoteKind.MARK, 0, "two"),
    ]
    base = b"\xfe" * SIZE
    source = MemorySource(table_of(LOG), SIZE, 9, lambda: MemoryDisk(base), payload, notes)
    return Timeline(source)


def sectors(disk: bytes) -> bytes:
    """One byte for each sector, all of which is the same."""
    parts = [disk[at : at + SECTOR] for at in range(0, len(disk), SECTOR)]
    assert all(len(set(part)) == 1 for part in parts)
    return bytes(part[0] for part in parts)


@pytest.fixture
def server() -> Iterator[StateServer]:
    """All states of the recording, served."""
    timeline = make_timeline()
    with StateServer(timeline) as running:
        yield running
    timeline.close()


def client_of(server: StateServer, name: str) -> NbdClient:
    return NbdClient(server.uri(name))


@pytest.mark.parametrize("name", DISKS)
def test_a_state_is_served_by_its_name(server: StateServer, name: str) -> None:
    with client_of(server, name) as client:
        assert sectors(client.read(0, SIZE)) == DISKS[name]
    state = state_named(server.exports.timeline, name)
    assert sectors(server.exports.timeline.open(state).pread(0, SIZE)) == DISKS[name]


def test_a_cut_is_all_that_was_sent_by_then() -> None:
    timeline = make_timeline()
    assert state_named(timeline, "end") == StateId(9, Level.RECEIVED, Choice.ALL)
    assert state_named(timeline, "seq:4").position == 5
    text = "s9.flushed.but4:1-2+sector4096"
    with pytest.raises(UsageError, match="has only 1 sectors"):
        state_named(timeline, text)
    assert str(state_named(timeline, "s9.flushed.draw3-4")) == "s9.flushed.draw3-4"


def test_names_of_cuts_are_listed(server: StateServer) -> None:
    timeline = server.exports.timeline
    expected = ["end", "before-exit", "riskiest", "mark:half way", "mark:two"]
    assert cut_names(timeline) == expected
    listed = nbdsh(
        f"""
        h.set_opt_mode(True)
        h.connect_uri({server.uri("")!r})
        found = []
        h.opt_list(lambda name, description: found.append(name))
        h.opt_abort()
        tell(found)
        """
    )
    assert listed == expected
    for name in expected:
        with client_of(server, name) as client:
            assert len(client.read(0, SIZE)) == SIZE


@pytest.mark.parametrize(
    "name",
    [
        *("nothing", "s10.flushed.must", "s9.flushed.but1", "s9.flushed.but8", "mark:three"),
        *("flush:2", "seq:9", "time:1h", "s9.flushed.must~8=base", "s9", "x" * 3000, "\N{SNOWMAN}"),
    ],
)
def test_other_names_are_refused_and_nothing_else_is_hurt(server: StateServer, name: str) -> None:
    refused = nbdsh(
        f"""
        def go(name):
            h = nbd.NBD()
            h.set_export_name(name)
            h.connect_unix({str(server.socket)!r})
        tell([outcome(lambda: go({name!r})), outcome(lambda: go("end"))])
        """
    )
    assert isinstance(refused, list)
    assert refused[0] is not None
    assert refused[1] is None


def test_what_one_client_writes_no_other_sees(server: StateServer) -> None:
    name = "s9.flushed.but4"
    with ExitStack() as stack:
        one, other = (stack.enter_context(client_of(server, name)) for _ in range(2))
        one.write(0, b"\x11" * SECTOR)
        one.flush()
        other.zero(7 * SECTOR, SECTOR)
        other.write(SECTOR, b"\x22" * SECTOR)
        assert one.read(0, SECTOR) == b"\x11" * SECTOR
        assert one.read(7 * SECTOR, SECTOR) == b"\7" * SECTOR
        assert other.read(0, 2 * SECTOR) == bytes(SECTOR) + b"\x22" * SECTOR
        assert other.read(7 * SECTOR, SECTOR) == bytes(SECTOR)
        third = stack.enter_context(client_of(server, name))
        assert sectors(third.read(0, SIZE)) == DISKS[name]
    with client_of(server, name) as later:
        assert sectors(later.read(0, SIZE)) == DISKS[name]
    assert sectors(server.exports.timeline.open(parse_state_id(name)).pread(0, SIZE)) == DISKS[name]


def test_it_is_remembered_what_was_read_of_a_watched_state(server: StateServer) -> None:
    name, exports = "s9.flushed.must", server.exports
    with client_of(server, name) as before:
        before.read(0, SECTOR)
        exports.watch(name)
        with client_of(server, name) as one, client_of(server, name) as other:
            one.read(2 * SECTOR, SECTOR)
            other.read(3 * SECTOR, SECTOR)
            with client_of(server, "end") as elsewhere:
                elsewhere.read(6 * SECTOR, SECTOR)
            one.write(5 * SECTOR, b"x" * SECTOR)
        # What a client wrote itself says nothing of the state.
        with client_of(server, name) as third:
            third.write(4 * SECTOR, b"y" * SECTOR)
            third.read(4 * SECTOR, SECTOR)
    found = list(exports.reads(name))
    assert found == [Extent(2 * SECTOR, 2 * SECTOR)]
    exports.watch(name)
    assert list(exports.reads(name)) == []


def test_the_empty_name_is_the_end(server: StateServer) -> None:
    with NbdClient.at(server.socket) as client:
        assert sectors(client.read(0, SIZE)) == DISKS["end"]
        assert client.description == "state s9.received.all"


def test_hundreds_of_states_one_after_the_other_and_at_once(server: StateServer) -> None:
    timeline = server.exports.timeline
    fields = CrashSpaceBuilder(timeline, Level.NOTHING, Options())
    states = [
        visit.state
        for position in (1, 5, 9)
        for stages in [Stages(fields.at(position))]
        for stage, size in stages.sizes().items()
        if size is not None
        for visit in stages.visits(stage)
    ]
    assert len(states) > 60
    wrong: list[str] = []

    def look(some: list[StateId]) -> None:
        for state in some:
            with client_of(server, str(state)) as client:
                if client.read(0, SIZE) != timeline.open(state).pread(0, SIZE):
                    wrong.append(str(state))

    threads = [threading.Thread(target=look, args=(states[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_the_server_ends_while_clients_are_there() -> None:
    timeline = make_timeline()
    with StateServer(timeline) as running:
        client = client_of(running, "end")
        assert sectors(client.read(0, SIZE)) == DISKS["end"]
        socket = running.socket
    client.drop()
    assert not socket.exists()
    assert not socket.parent.exists()


def test_the_shelf_gives_each_taker_an_export_of_its_own() -> None:
    exports = StateExports(make_timeline())
    one, other = exports.take("end"), exports.take("end")
    assert one is not other
    assert list(exports.noted) == []
    exports.put_back(one)
    exports.put_back(other)
    with pytest.raises(UsageError):
        exports.take("nothing")
    with pytest.raises(KeyError):
        exports.infos["nothing"]
    info = exports.infos["s9.flushed.must"]
    assert (info.name, info.size) == ("s9.flushed.must", SIZE)


def test_nbdinfo_tells_which_state_it_is(server: StateServer) -> None:
    said = tool("nbdinfo", server.uri("s9.flushed.but4"))
    assert "s9.flushed.but4" in said
    assert f"export-size: {SIZE}" in said

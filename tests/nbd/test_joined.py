"""The client core and the server core, joined in memory: random requests on a bytearray.

Every form of replies, with and without contexts, TLS and EXPORT_NAME; bytes go over in pieces of
any size, requests are executed in any order, and some fail. Not covered: sockets and real TLS.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.nbd.client import ClientConnection, ClientPhase
from nbdproxy.nbd.constants import ReplyStyle, TlsMode, TransmissionFlag
from nbdproxy.nbd.events import Refused
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from nbdproxy.nbd.server import ServerConnection
from nbdproxy.requests import Command, CommandFlag, NbdErrno, Request
from tests.nbd.joined import SECTOR, Asked, Pair, Served, apply, sent_by, states

SIZE = 64 * 1024
EXPORT = ExportInfo("disk", SIZE, WRITABLE, "of the test")
EXPORT_NAME_ONLY = frozenset({6, 7, 8, 9, 10, 11})


class Setting(NamedTuple):
    """What both ends can do, and what has to come of it."""

    style: ReplyStyle
    contexts: bool
    best: ReplyStyle = ReplyStyle.EXTENDED
    wanted: bool = True
    deny: frozenset[int] = frozenset()
    tls: bool = False
    told: bool = True
    """Whether GO told of block sizes and texts."""


SETTINGS = {
    "extended": Setting(ReplyStyle.EXTENDED, True),
    "extended, TLS": Setting(ReplyStyle.EXTENDED, True, tls=True),
    "extended, no contexts wanted": Setting(ReplyStyle.EXTENDED, False, wanted=False),
    "extended, no contexts known": Setting(ReplyStyle.EXTENDED, False, deny=frozenset({9, 10})),
    "structured wanted": Setting(ReplyStyle.STRUCTURED, True, best=ReplyStyle.STRUCTURED),
    "structured known": Setting(ReplyStyle.STRUCTURED, True, deny=frozenset({11})),
    "structured, no contexts": Setting(ReplyStyle.STRUCTURED, False, deny=frozenset({10, 11})),
    "structured, by name": Setting(
        ReplyStyle.STRUCTURED, True, deny=frozenset({6, 7, 11}), told=False
    ),
    "structured, TLS": Setting(ReplyStyle.STRUCTURED, True, deny=frozenset({11}), tls=True),
    "simple wanted": Setting(ReplyStyle.SIMPLE, False, best=ReplyStyle.SIMPLE),
    "simple known": Setting(ReplyStyle.SIMPLE, False, deny=frozenset({8, 11})),
    "simple, by name": Setting(ReplyStyle.SIMPLE, False, deny=EXPORT_NAME_ONLY, told=False),
    "simple, TLS": Setting(ReplyStyle.SIMPLE, False, best=ReplyStyle.SIMPLE, tls=True),
}

SECTORS = SIZE // SECTOR
FLAGS = {
    Command.READ: [CommandFlag.FUA, CommandFlag.DF],
    Command.WRITE: [CommandFlag.FUA],
    Command.TRIM: [CommandFlag.FUA],
    Command.WRITE_ZEROES: [CommandFlag.FUA, CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO],
    Command.BLOCK_STATUS: [CommandFlag.REQ_ONE],
}


@st.composite
def legal(draw: st.DrawFn) -> Asked:
    """A request that the server takes, if it knows the command and its flag at all."""
    command = draw(st.sampled_from([*FLAGS, Command.READ, Command.WRITE, Command.FLUSH]))
    if command == Command.FLUSH:
        return Asked(command, 0, 0)
    first = draw(st.integers(0, SECTORS - 1)) * SECTOR + draw(st.sampled_from([0, 0, 1, 511]))
    most = SIZE - first
    count = draw(st.integers(1, min(40 * SECTOR, most)) | st.just(most))
    flag = draw(st.sampled_from([0, 0, *FLAGS[command]]))
    fill = draw(st.sampled_from([0, 7, 255]))
    return Asked(command, first, count, int(flag), fill)


wild = st.builds(
    Asked,
    st.integers(0, 8).filter(lambda command: command != Command.DISC),
    st.sampled_from([0, 1, SECTOR, SIZE, 2**63]),
    st.sampled_from([0, 1, SECTOR, SIZE, SIZE + SECTOR]),
    st.sampled_from([0, 1, 2, 4, 8, 16, 64]),
    st.just(7),
)
requests = legal() | legal() | legal() | wild
batches = st.lists(st.lists(requests, min_size=1, max_size=8), max_size=4)
steps = st.lists(st.integers(1, 40) | st.integers(1, 100_000), min_size=1, max_size=8)


def join(setting: Setting, lots: random.Random, pieces: Iterator[int], faulty: bool) -> Pair:
    """A pair that is ready, with a disk that has data and holes."""
    disk = bytearray(SIZE)
    for at in range(0, SIZE, 3 * 4096):
        disk[at + 100 : at + 5000] = b"d" * 4900

    def shuffle(waiting: list[Request | Refused]) -> None:
        lots.shuffle(waiting)

    def fault(_: Request) -> int:
        return NbdErrno.EIO if faulty and not lots.randrange(5) else 0

    tls = TlsMode.REQUIRE if setting.tls else TlsMode.OFF
    served = Served(ServerConnection({"disk": EXPORT}, tls=tls), disk, shuffle, fault, setting.deny)
    client = ClientConnection("disk", tls=setting.tls, best=setting.best, contexts=setting.wanted)
    pair = Pair(client, served, pieces)
    pair.run()
    assert pair.ready
    return pair


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_both_ends_agree(setting: Setting, step: int) -> None:
    pair = join(setting, random.Random(1), itertools.repeat(step), faulty=False)
    client, terms = pair.client, pair.served.core.terms
    assert terms is not None
    assert (client.style, client.contexts) == (setting.style, setting.contexts)
    assert (terms.style, terms.contexts) == (setting.style, setting.contexts)
    flags = TransmissionFlag(terms.flags)
    if setting.told:
        assert client.export == ExportInfo("disk", SIZE, flags, "of the test")
    else:
        assert client.export == ExportInfo("disk", SIZE, flags, min_block=1)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@given(batches=batches, steps=steps, lots=st.randoms(use_true_random=False), faulty=st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_requests_mean_the_same_on_both_ends(
    setting: Setting,
    batches: list[list[Asked]],
    steps: list[int],
    lots: random.Random,
    faulty: bool,
) -> None:
    pair = join(setting, lots, itertools.cycle(steps), faulty)
    model = bytearray(pair.served.disk)
    for batch in batches:
        for one in batch:
            pair.ask(one)
        pair.run()
        assert pair.client.in_flight == 0
        # What was executed, in its order, must give what the client was told.
        for cookie, error in pair.served.done:
            check(pair, cookie, error, model)
        pair.served.done.clear()
    assert pair.served.disk == model
    pair.disconnect()
    pair.run()
    assert pair.client.phase is ClientPhase.CLOSED


def check(pair: Pair, cookie: int, error: int, model: bytearray) -> None:
    """Check one result against the model, and bring the model up to date."""
    one, result = pair.asked.pop(cookie), pair.results.pop(cookie)
    assert result.done
    assert result.error == error
    assert bool(result.text) == (bool(error) and pair.client.style is not ReplyStyle.SIMPLE)
    if error:
        assert (result.got, result.extents) == (0, None)
        return
    end = one.offset + one.length
    assert end <= SIZE
    apply(one.command, model, one.offset, bytes([one.fill]) * one.length, one.length)
    if one.command == Command.READ:
        assert result.got == one.length
        assert result.data == model[one.offset : end]
    elif one.command == Command.BLOCK_STATUS:
        expected = states(model, one.offset, end)
        assert result.extents == (expected[:1] if one.flags & CommandFlag.REQ_ONE else expected)


def phase_of(pair: Pair) -> ClientPhase:
    return pair.client.phase  # a function, since mypy believes that an attribute stays


def test_a_good_bye_waits_for_what_is_in_flight() -> None:
    pair = join(SETTINGS["extended"], random.Random(1), itertools.repeat(5), faulty=False)
    pair.ask(Asked(Command.READ, 0, SIZE))
    pair.ask(Asked(Command.WRITE, 0, SECTOR, 0, 9))
    pair.disconnect()
    assert phase_of(pair) is ClientPhase.LEAVING
    pair.run()
    assert phase_of(pair) is ClientPhase.CLOSED
    assert all(result.done and not result.error for result in pair.results.values())


@pytest.mark.parametrize(
    ("name", "tls", "wants_tls", "words"),
    [
        ("disc", TlsMode.OFF, False, 'has no export "disc" (it says: "no export has this name")'),
        ("disk", TlsMode.OFF, True, "the server offers no TLS"),
        ("disk", TlsMode.REQUIRE, False, "the server requires TLS"),
    ],
)
def test_what_the_server_declines_ends_with_an_abort(
    name: str, tls: TlsMode, wants_tls: bool, words: str
) -> None:
    client, server = (
        ClientConnection(name, tls=wants_tls),
        ServerConnection({"disk": EXPORT}, tls=tls),
    )
    said = b"NBDMAGICIHAVEOPT\x00\x03"
    while client.breach is None:
        _, told = client.receive(memoryview(said))
        sent = sent_by(told)
        _, answers = server.receive(memoryview(sent))
        said = sent_by(answers)
    assert words in str(client.breach)
    assert server.breach is None
    assert server.phase.name == "CLOSED"

"""`receive(owed=)`: how many READs are taken at once, and that nothing is lost by it.

A shell gives the bytes that its replies may still hold; what was not taken is handed in again.
"""

from __future__ import annotations

from itertools import chain

import pytest

from nbdproxy.nbd.constants import ReplyStyle
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from nbdproxy.nbd.server import ServerConnection
from tests.nbd import spec
from tests.nbd.wire import SIZE, Plain, opening, plain, request, transmit

STYLES = pytest.mark.parametrize("style", ReplyStyle)
DISK = ExportInfo("disk", SIZE, WRITABLE)
READ = 4096


def batches(data: bytes, style: int, owed: int) -> list[list[Plain]]:
    """What each call takes of requests that are all there, until there is nothing left."""
    connection = ServerConnection({"disk": DISK})
    hello = opening(style)
    assert connection.receive(memoryview(hello))[0] == len(hello)
    taken = []
    while data:
        used, events = connection.receive(memoryview(data), owed=owed)
        assert used > 0
        assert events
        taken.append([plain(event) for event in events])
        data = data[used:]
    assert connection.breach is None
    return taken


def reads(count: int, style: int, length: int = READ) -> bytes:
    return b"".join(request(0, 0, length, cookie=n, style=style) for n in range(count))


def write(style: int, cookie: int = 0) -> bytes:
    flags = spec.PAYLOAD_LEN if style == spec.EXTENDED else 0
    return request(1, 0, 512, flags=flags, cookie=cookie, payload=b"w" * 512, style=style)


@STYLES
@pytest.mark.parametrize(
    ("owed", "at_once"), [(1, 1), (READ, 1), (READ + 1, 2), (3 * READ, 3), (1 << 62, 10)]
)
def test_no_request_is_taken_once_the_replies_hold_what_may_be_owed(
    style: int, owed: int, at_once: int
) -> None:
    data = reads(10, style)
    found = batches(data, style, owed)
    assert [len(batch) for batch in found[:-1]] == [at_once] * (len(found) - 1)
    assert list(chain(*found)) == transmit(data, style=style)


@STYLES
def test_what_has_no_data_in_its_reply_is_not_counted(style: int) -> None:
    others = write(style) + request(3, style=style) + request(6, 0, SIZE, style=style)
    data = (others + reads(1, style) + others) * 3
    found = batches(data, style, 1)
    assert [len(batch) for batch in found] == [4, 7, 7, 3]
    assert list(chain(*found)) == transmit(data, style=style)


@STYLES
def test_nothing_is_taken_while_too_much_is_owed(style: int) -> None:
    connection = ServerConnection({"disk": DISK})
    data = opening(style) + reads(2, style)
    used, events = connection.receive(memoryview(data), owed=0)
    assert len(data) - used == len(reads(2, style))
    assert connection.receive(memoryview(data[used:]), owed=0) == (0, [])
    assert len(connection.receive(memoryview(data[used:]))[1]) == 2
    assert events[-1] == ("disk",)


@STYLES
@pytest.mark.parametrize("owed", [1, READ, 2 * READ])
def test_a_part_of_a_request_behind_is_kept(style: int, owed: int) -> None:
    data = reads(3, style) + write(style, cookie=9)
    connection = ServerConnection({"disk": DISK})
    connection.receive(memoryview(opening(style)))
    rest, events = b"", []
    for at in range(0, len(data), 50):
        rest += data[at : at + 50]
        while True:
            used, found = connection.receive(memoryview(rest), owed=owed)
            events += [plain(event) for event in found]
            rest = rest[used:]
            if not used:
                break
    assert (events, rest) == (transmit(data, style=style), b"")


@STYLES
@pytest.mark.parametrize("length", [100, 2 * SIZE, spec.MAX_PAYLOAD + 512, 2**32 - 1])
def test_a_refused_read_owes_nothing(style: int, length: int) -> None:
    data = reads(3, style, length) + reads(1, style)
    assert [len(batch) for batch in batches(data, style, READ)] == [4]


def test_a_refused_read_of_64_bits_does_not_stop_what_is_behind_it() -> None:
    style = spec.EXTENDED
    data = request(0, 0, 2**64 - 512, style=style) + request(3, style=style)
    assert [event[0] for event in transmit(data, style=style)] == ["refused", "request"]

"""Attacks on NBD servers that had a CVE, as far as the core sees them: one test each.

Not covered, because time, sockets and shutdown are the session's: how long an idle client may stay
(CVE-2019-14850), and many half-negotiated clients while the server stops (CVE-2024-7409).
"""

from __future__ import annotations

import itertools
import struct

import pytest

from nbdproxy.nbd.constants import MAX_OPTION_DATA, MAX_OPTIONS, ReplyStyle, TlsMode
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from nbdproxy.nbd.replies import Replies
from nbdproxy.nbd.server import Phase, ServerConnection
from nbdproxy.requests import Request
from tests.nbd import spec
from tests.nbd.decode import Sent, decode
from tests.nbd.wire import (
    FLAGS,
    SIZE,
    Server,
    breach,
    contexts,
    go,
    info_body,
    kinds,
    negotiate,
    opening,
    option,
    pour,
    query_body,
    request,
    told,
    transmit,
)

CONTEXT = spec.CONTEXT


def test_cve_2013_7441_closing_or_an_unknown_export_in_mid_negotiation() -> None:
    """nbd-server's parent exited when a client left during the negotiation."""
    whole = FLAGS + option(3) + option(8) + contexts(10, b"disk", CONTEXT) + go(b"disk")
    for end in range(len(whole)):
        poured = pour((whole[:end],), end or 1)
        assert poured.connection.breach is None
        assert ("opened", "disk") not in poured.events
    breach(FLAGS + option(1, b"unknown"), words="does not exist")
    assert kinds(negotiate(go(b"unknown") + go(b"disk")))[-1] == "opened"


def test_cve_2017_7539_data_where_none_is_due() -> None:
    """qemu-nbd hit an assertion when an option that takes no data had some."""
    for number in (3, 5, 8, 11):
        for data in (b"x", b"IHAVEOPT" * 100, b"\x00" * MAX_OPTION_DATA):
            server = Server(tls=TlsMode.ALLOW)
            replies = negotiate(option(number, data) + go(), server=server)
            assert kinds(replies)[0] == spec.ERR_INVALID
            assert kinds(replies)[-1] == "opened"
    for number in (0, 4, 12):
        assert kinds(negotiate(option(number, b"x" * 999) + go()))[-1] == "opened"


def test_cve_2017_9524_a_client_before_an_export_is_ready() -> None:
    """qemu-nbd crashed on a client that came before the device was set up."""
    empty = Server({})
    for name in (b"", b"disk"):
        for number in (6, 7):
            assert kinds(negotiate(go(name, number=number), server=empty)) == [spec.ERR_UNKNOWN]
        breach(FLAGS + option(1, name), words="does not exist", server=empty)
        chosen = option(8) + contexts(10, name, CONTEXT)
        assert kinds(negotiate(chosen, server=empty))[-1] == spec.ERR_UNKNOWN
    assert kinds(negotiate(option(3), server=empty)) == [spec.ACK]


def test_cve_2017_10664_an_abort_where_none_is_due() -> None:
    """qemu-nbd died when a client was gone before it had its answer."""
    for before in (b"", option(3), option(11), go(b"unknown"), option(99)):
        for data in (b"", b"x", b"x" * 70, b"\x00" * MAX_OPTION_DATA):
            events = negotiate(before + option(2, data) + go() + b"more")
            assert kinds(events)[-2:] == [spec.ACK, "closed"]
    read, abort = request(0, 0, 512), option(2)
    breach(opening(spec.SIMPLE) + read + abort + bytes(28), words="request began with")


@pytest.mark.parametrize("number", [1, 6, 7, 9, 10])
def test_cve_2017_15118_a_name_of_3000_bytes(number: int) -> None:
    """qemu-nbd copied any name into 256 bytes on its stack."""
    name = b"n" * 3000
    exports = {"disk": ExportInfo("disk", SIZE, WRITABLE)}
    body = {1: name, 9: query_body(name), 10: query_body(name)}.get(number, info_body(name))
    if number == 1:
        breach(FLAGS + option(1, body), words="does not exist", server=Server(exports))
    else:
        data = option(8) + option(number, body) + go(b"disk")
        replies = negotiate(data, server=Server(exports))
        assert kinds(replies)[1] == spec.ERR_UNKNOWN
        assert kinds(replies)[-1] == "opened"
    long = {name.decode(): ExportInfo(name.decode(), SIZE, WRITABLE)}
    data = option(8) + option(number, body)
    assert kinds(negotiate(data, server=Server(long)))[-1] in {spec.ACK, "opened"}


def test_cve_2017_15119_endless_huge_options() -> None:
    """qemu-nbd read and dropped options of 4 GiB for as long as a client sent them."""
    for length in (MAX_OPTION_DATA + 1, 2**31, 2**32 - 1):
        for number in (2, 3, 7, 99):
            breach(FLAGS + option(number, length=length), words="announces")
    huge = option(99, b"\x00" * MAX_OPTION_DATA) * MAX_OPTIONS
    assert kinds(negotiate(huge)) == [spec.ERR_UNSUP] * MAX_OPTIONS
    breach(FLAGS + huge + option(99), words="options before transmission")
    # Nothing is kept, and what has to be kept by the shell is bounded.
    poured = pour((FLAGS + option(99, length=MAX_OPTION_DATA) + b"x" * 1000,), 1 << 20)
    assert poured.connection.needed == 16 + MAX_OPTION_DATA


def test_cve_2019_14850_an_idle_client_holds_a_headers_room_and_no_more() -> None:
    """nbdkit opened its plugin for a client that said nothing; here that needs a GO."""
    idle = pour((b"",), 1)
    assert (idle.events, idle.connection.needed) == ([], 4)
    for style in ReplyStyle:
        hello = opening(style)
        for data, phase, room in [
            (FLAGS, Phase.OPTIONS, 16),
            (FLAGS + option(3), Phase.OPTIONS, 16),
            (hello, Phase.TRANSMISSION, 32 if style is ReplyStyle.EXTENDED else 28),
        ]:
            poured = pour((data,), len(data))
            assert (poured.connection.phase, poured.connection.needed) == (phase, room)
            assert (("opened", "disk") in poured.events) == (phase is Phase.TRANSMISSION)


def test_cve_2019_14851_options_in_odd_order_and_then_go() -> None:
    """nbdkit hit an assertion on certain sequences of options."""
    odd = [
        (go(b"other", number=6), 6),
        (contexts(9, b"other"), 9),
        (contexts(10, b"other", CONTEXT), 10),
        (option(8), 8),
        (option(11), 11),
    ]
    for order in itertools.permutations(odd):
        bargain = spec.Bargain([b"disk", b"other"])
        for data, number in order:
            (final,) = bargain.answers(number, data[16:])
            bargain.asked(number, data[16:], final)
        opens = b"".join(data for data, _ in order) + go(b"disk")
        sent = request(7, 0, 512, style=bargain.style) + request(3, style=bargain.style)
        events = negotiate(opens + sent)
        assert [event[0] for event in events[-3:]] == ["opened", "refused", "request"]
        flags = spec.flags_told(WRITABLE, bargain.style, contexts=False)
        assert told(events, 7)[0] == struct.pack(">QH", SIZE, flags)


def test_cve_2020_10761_an_unknown_name_of_4096_bytes_is_not_echoed() -> None:
    """qemu-nbd put a long unknown name into an error, which was too long for its own assertion."""
    for name in (b"A" * 4096, b"%s%n" * 1024, b"\xff" * 4096):
        for number, body in ((6, info_body(name)), (7, info_body(name)), (10, query_body(name))):
            reply = negotiate(option(8) + option(number, body))[-1]
            assert reply[2] == spec.ERR_UNKNOWN
            assert isinstance(reply[3], bytes)
            assert len(reply[3]) < 100
            assert name[:4] not in reply[3]


def test_cve_2021_3716_plaintext_before_starttls_is_forgotten() -> None:
    """nbdkit kept what somebody in the middle had injected before the handshake."""
    server = Server(tls=TlsMode.ALLOW)
    injected = option(8) + option(11) + contexts(10, b"disk", CONTEXT) + go(b"disk", number=6)
    behind = go(b"disk") + request(0, 0, 512) + request(7, 0, 512)
    events = negotiate(injected + option(5), behind, server=server)
    assert [event[0] for event in events[-3:]] == ["opened", "request", "refused"]
    assert told(events[events.index(("starttls",)) :], 7)[0] == struct.pack(">QH", SIZE, WRITABLE)


@pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
def test_cve_2021_3716_plaintext_behind_starttls_is_not_read(mode: TlsMode) -> None:
    """The same from the other side: bytes behind STARTTLS must not count as said within TLS."""
    for behind in (option(8), go(b"disk"), option(2), b"\x16\x03\x01\x02\x00", b"I"):
        connection = ServerConnection(Server().exports, tls=mode)
        used, events = connection.receive(memoryview(FLAGS + option(5) + behind))
        assert used == 20 + len(behind)
        assert [type(event).__name__ for event in events] == ["Send", "StartTls"]
        assert connection.breach is not None
        assert connection.phase is Phase.CLOSED


@pytest.mark.parametrize("number", [6, 7, 9, 10])
@pytest.mark.parametrize("name_length", [0xFFFFFFFF, 0xFFFFFFFC, 0x80000000])
def test_cve_2022_26495_a_name_length_of_0xffffffff(number: int, name_length: int) -> None:
    """nbd-server added 1 to the length, and got 0."""
    for rest in (b"", b"disk", b"disk" + bytes(6), bytes(2000)):
        body = struct.pack(">I", name_length) + rest
        replies = negotiate(option(8) + option(number, body) + go(b"disk"))
        assert kinds(replies)[1] == spec.ERR_INVALID
        assert kinds(replies)[-1] == "opened"


@pytest.mark.parametrize("number", [6, 7, 9, 10])
def test_cve_2022_26496_a_name_far_past_the_options_data(number: int) -> None:
    """nbd-server read a name of the announced length, whatever the option's own length was."""
    for claimed, given in [(5, 4), (4096, 10), (65_530, 100), (2000, 1994)]:
        body = struct.pack(">I", claimed) + b"n" * given
        replies = negotiate(option(8) + option(number, body) + go(b"disk"))
        assert kinds(replies)[1] == spec.ERR_INVALID
        assert kinds(replies)[-1] == "opened"
    queries = struct.pack(">I4sII", 4, b"disk", 1, 4096) + CONTEXT
    if number in {9, 10}:
        replies = negotiate(option(8) + option(number, queries) + go(b"disk"))
        assert kinds(replies)[1] == spec.ERR_INVALID


NEAR = [2**32 - 65536, 2**32 - 65535, 2**32 - 4096, 2**32 - 512, 2**32 - 1]


@pytest.mark.parametrize("length", NEAR)
def test_cve_2025_47711_a_status_of_nearly_2_to_the_32_bytes(length: int) -> None:
    """nbdkit's extents were rounded up to 2^32, which is 0 in the 32 bits of a reply."""
    huge = ExportInfo("disk", 2**40, WRITABLE)
    sent = request(7, 0, length, style=1)
    (event,) = transmit(sent, huge, style=1, with_contexts=True)
    assert event[0] == "request"
    replies = Replies(ReplyStyle.STRUCTURED)
    asked = Request(7, 0, 1, 0, length, memoryview(b""))
    replies.status(asked, [(2**40, 3)])
    stream = b"".join(bytes(part) for part in replies.take())
    # `decode` refuses an extent of 0 bytes.
    ((told_length, flags),) = decode(stream, 1, [Sent(*asked[:5])])[1].extents
    assert (told_length, flags) == (2**32 - 65536, 3)


@pytest.mark.parametrize("style", [ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED])
@pytest.mark.parametrize("length", NEAR)
@pytest.mark.parametrize("offset", [0, 512, 2**40 - 2**32 + 512, 2**40 - 512])
def test_cve_2025_47712_a_status_that_ends_behind_or_near_the_end(
    style: ReplyStyle, length: int, offset: int
) -> None:
    """nbdkit's blocksize filter rounded the length of a status up, and it wrapped around."""
    huge = ExportInfo("disk", 2**40, WRITABLE, min_block=512)
    sent = request(7, offset, length, style=style) + request(3, style=style)
    event, following = transmit(sent, huge, style=style, with_contexts=True)
    legal = length % 512 == 0 and offset + length <= 2**40
    assert event[:2] == (("request", 7) if legal else ("refused", spec.EINVAL))
    assert event[5 if legal else 6] == length
    assert following[0] == "request"

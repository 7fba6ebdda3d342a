"""Structured replies and extended headers in every order, and the flags that follow from them.

What was agreed on shows in three places: the replies to options, the flags that INFO, GO and
EXPORT_NAME tell, and the form of requests that is read afterwards.

Not covered: TLS, which forgets all of it; see test_tls_options.
"""

from __future__ import annotations

import itertools
import struct

import pytest

from nbdproxy.nbd.constants import TransmissionFlag
from nbdproxy.nbd.export_info import READABLE, WRITABLE, ExportInfo
from tests.nbd import spec
from tests.nbd.wire import (
    FLAGS,
    SIZE,
    Server,
    breach,
    contexts,
    go,
    kinds,
    negotiate,
    opening,
    option,
    request,
    told,
    transmit,
)

STYLES = pytest.mark.parametrize("style", [spec.SIMPLE, spec.STRUCTURED, spec.EXTENDED])
STEPS = {
    "structured": option(8),
    "extended": option(11),
    "set": contexts(10, b"disk", spec.CONTEXT),
    "unset": contexts(10, b"disk"),
    "list": contexts(9, b"disk"),
}
NUMBER = {"structured": 8, "extended": 11, "set": 10, "unset": 10, "list": 9}
ORDERS = [order for count in range(5) for order in itertools.product(STEPS, repeat=count)]


def expected(order: tuple[str, ...]) -> tuple[list[int], spec.Bargain]:
    """The final reply to each step, and where they lead, by the specification."""
    bargain, finals = spec.Bargain([b"disk", b"other"]), []
    for step in order:
        body = STEPS[step][16:]
        (final,) = bargain.answers(NUMBER[step], body)
        bargain.asked(NUMBER[step], body, final)
        finals.append(final)
    return finals, bargain


def test_every_order_of_up_to_four_options_leads_where_the_specification_says() -> None:
    for order in ORDERS:
        finals, bargain = expected(order)
        style, chosen = bargain.style, bargain.context_of == b"disk"
        data = b"".join(STEPS[step] for step in order) + go(b"disk")
        events = negotiate(data + request(7, 0, 512, style=style))
        replies = [event for event in events if event[0] == "reply" and event[1] != 7]
        assert [kind for kind in kinds(replies) if kind != spec.META_CONTEXT] == finals, order
        flags = int.from_bytes(told(events, 7)[0][8:])
        assert flags == spec.flags_told(WRITABLE, style, contexts=chosen), order
        assert events[-1][0] == ("request" if chosen else "refused"), order


@STYLES
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("can", [WRITABLE, READABLE | 2, READABLE | 16], ids=int)
def test_the_flags_are_the_same_wherever_they_are_told(style: int, chosen: bool, can: int) -> None:
    server = Server({"disk": ExportInfo("disk", SIZE, TransmissionFlag(can))})
    options = opening(style, with_contexts=chosen and style != spec.SIMPLE)[4 : -len(go())]
    flags = spec.flags_told(can, style, contexts=chosen and style != spec.SIMPLE)
    size_and_flags = struct.pack(">QH", SIZE, flags)
    assert told(negotiate(options + go(), server=server), 7)[0] == size_and_flags
    if style != spec.EXTENDED:
        events = negotiate(options + option(1, b"disk"), server=server)
        assert events[-2:] == [("send", size_and_flags), ("opened", "disk")]
    # INFO tells of the filters that could be had, were a context chosen.
    could = flags | (spec.BLOCK_STATUS_PAYLOAD if style == spec.EXTENDED else 0)
    replies = negotiate(options + go(number=6), server=server)
    assert told(replies, 6)[0] == struct.pack(">QH", SIZE, could)


BETWEEN = {
    "nothing": (b"", True),
    "a list": (option(3), False),
    "another info": (go(b"other", number=6), False),
    "a refused go": (go(b"nothing"), False),
    "contexts of another export": (contexts(10, b"other", spec.CONTEXT), False),
    "the same info again": (go(b"disk", [3], number=6), True),
}


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(("between", "same"), BETWEEN.values(), ids=BETWEEN.keys())
def test_go_tells_what_the_same_info_told_just_before(
    chosen: bool, between: bytes, same: bool
) -> None:
    options = option(11) + (contexts(10, b"disk", spec.CONTEXT) if chosen else b"")
    sent = struct.pack(">QI", 512, spec.CONTEXT_ID)
    filtered = request(7, 0, 12, flags=spec.PAYLOAD_LEN, payload=sent, style=spec.EXTENDED)
    for infos, alike in [([3], same), ([], False), ([3, 1], False)]:
        data = options + go(b"disk", [3], number=6) + between + go(b"disk", infos) + filtered
        events = negotiate(data)
        flags = int.from_bytes(told(events, 7)[0][8:])
        has_context = chosen and between != BETWEEN["contexts of another export"][0]
        assert bool(flags & spec.BLOCK_STATUS_PAYLOAD) == (has_context or alike)
        # Told or not, without a context there is nothing to filter.
        assert events[-1][:2] == (("request", 7) if has_context else ("refused", spec.EINVAL))


def test_a_filter_is_offered_for_the_export_whose_contexts_were_chosen_and_no_other() -> None:
    options = option(11) + contexts(10, b"disk", spec.CONTEXT)
    for name, offered in [(b"disk", True), (b"", True), (b"other", False)]:
        flags = int.from_bytes(told(negotiate(options + go(name)), 7)[0][8:])
        assert bool(flags & spec.BLOCK_STATUS_PAYLOAD) == offered


def test_export_name_is_not_for_extended_headers() -> None:
    words = "EXPORT_NAME after extended headers"
    for before in (option(11), option(8) + option(11), option(11) + option(8)):
        breach(FLAGS + before + option(1, b"disk"), words=words)


def test_extended_headers_win_over_structured_replies_in_both_orders() -> None:
    read = request(0, 0, 512, style=spec.EXTENDED)
    assert negotiate(option(8) + option(11) + go() + read)[-1][0] == "request"
    events = negotiate(option(11) + option(8) + go() + read)
    assert kinds(events)[1] == spec.ERR_EXT_HEADER_REQD
    assert events[-1][0] == "request"


@STYLES
@pytest.mark.parametrize("other", [spec.SIMPLE, spec.STRUCTURED, spec.EXTENDED])
def test_a_request_of_the_wrong_form_ends_the_connection(style: int, other: int) -> None:
    data = opening(style) + request(3, style=other) + bytes(8)
    if (style == spec.EXTENDED) != (other == spec.EXTENDED):
        breach(data, words="request began with")
    else:
        assert transmit(request(3, style=other), style=style)[0][0] == "request"


@STYLES
def test_df_is_for_replies_in_chunks(style: int) -> None:
    read = request(0, 0, 512, flags=spec.DF, style=style)
    (event,) = transmit(read, style=style)
    assert event[:2] == (("request", 0) if style != spec.SIMPLE else ("refused", spec.EINVAL))


@STYLES
@pytest.mark.parametrize("chosen", [False, True])
def test_block_status_is_for_chosen_contexts(style: int, chosen: bool) -> None:
    chosen = chosen and style != spec.SIMPLE
    for flags in (0, spec.REQ_ONE, spec.REQ_ONE | spec.FUA):
        status = request(7, 512, 1024, flags=flags, style=style)
        (event,) = transmit(status, style=style, with_contexts=chosen)
        if chosen:
            assert event == ("request", 7, flags, 7, 512, 1024, b"")
        else:
            assert event[:2] == ("refused", spec.EINVAL)


@pytest.mark.parametrize("style", [spec.SIMPLE, spec.STRUCTURED])
@pytest.mark.parametrize("command", [*spec.COMMANDS, 8, 99])
def test_payload_len_is_not_for_compact_headers(style: int, command: int) -> None:
    payload = b"p" * 512 if command == 1 else b""
    sent = request(command, 0, 512, flags=spec.PAYLOAD_LEN, payload=payload, style=style)
    events = transmit(sent + request(0, 0, 512), style=style, with_contexts=style > 0)
    assert [event[0] for event in events] == ["refused", "request"]
    assert events[0] == ("refused", spec.EINVAL, command, spec.PAYLOAD_LEN, 7, 0, 512, payload)

"""Requests with extended headers: payloads where they are and are not due, filters, 64-bit lengths.

Each case is followed by a READ, so that it shows whether the stream is still in step.

Not covered: rules that do not depend on the headers; test_transmission has them in all styles.
"""

from __future__ import annotations

import struct

import pytest

from nbdproxy.nbd.constants import TransmissionFlag
from nbdproxy.nbd.export_info import WRITABLE, ExportInfo
from tests.nbd import spec
from tests.nbd.wire import SIZE, Plain, Server, breach, opening, pour, request, transmit

OK = 0
HUGE = ExportInfo("disk", 2**63 - 512, WRITABLE)
DISK = ExportInfo("disk", SIZE, WRITABLE)
LEN = spec.PAYLOAD_LEN
COMMANDS = [*spec.COMMANDS, 8, 9, 65535]
OVERLONG = [spec.MAX_PAYLOAD + 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]


def judged(
    command: int,
    offset: int,
    length: int,
    *,
    flags: int = 0,
    payload: bytes = b"",
    export: ExportInfo = DISK,
    with_contexts: bool = True,
) -> Plain:
    """The event of one request; whatever it is, the next one is in step."""
    sent = request(command, offset, length, flags=flags, payload=payload, style=spec.EXTENDED)
    sent += request(0, 0, 512, cookie=99, style=spec.EXTENDED)
    event, following = transmit(sent, export, style=spec.EXTENDED, with_contexts=with_contexts)
    assert following == ("request", 0, 0, 99, 0, 512, b"")
    return event


def status_filter(length: int, *ids: int) -> bytes:
    """What a BLOCK_STATUS with a payload carries."""
    return struct.pack(f">Q{len(ids)}I", length, *ids)


def test_a_write_has_a_payload_and_its_flag() -> None:
    event = judged(1, 512, 1024, flags=LEN, payload=b"w" * 1024)
    assert event == ("request", 1, 0, 7, 512, 1024, b"w" * 1024)
    event = judged(1, 512, 1024, flags=LEN | spec.FUA, payload=b"w" * 1024)
    assert event == ("request", 1, spec.FUA, 7, 512, 1024, b"w" * 1024)


def test_a_write_without_its_flag_has_a_payload_all_the_same() -> None:
    # It MUST have the flag, but QEMU's client (10.0) forgets it.
    event = judged(1, 512, 1024, payload=b"w" * 1024)
    assert event == ("request", 1, 0, 7, 512, 1024, b"w" * 1024)
    event = judged(1, SIZE, 512, flags=spec.FUA, payload=b"w" * 512)
    assert event == ("refused", spec.ENOSPC, 1, spec.FUA, 7, SIZE, 512, b"w" * 512)


@pytest.mark.parametrize("length", OVERLONG)
def test_an_overlong_write_is_not_waited_for_with_or_without_its_flag(length: int) -> None:
    for flags in (0, LEN):
        sent = request(1, 0, length, flags=flags, style=spec.EXTENDED)
        breach(opening(spec.EXTENDED) + sent, words="more than the maximum")


@pytest.mark.parametrize(
    ("offset", "length", "error"),
    [(0, 0, spec.EINVAL), (SIZE - 99, 100, spec.ENOSPC), (SIZE, 512, spec.ENOSPC)],
)
def test_the_payload_of_a_refused_write_is_drained(offset: int, length: int, error: int) -> None:
    payload = b"w" * length
    event = judged(1, offset, length, flags=LEN, payload=payload)
    assert event == ("refused", error, 1, 0, 7, offset, length, payload)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in {1, 7}])
@pytest.mark.parametrize("length", [0, 1, 12, 512, 4096])
def test_a_payload_that_is_not_due_is_drained_and_invalid(command: int, length: int) -> None:
    event = judged(command, 0, length, flags=LEN, payload=b"\x25" * length)
    assert event[:2] == ("refused", spec.EINVAL)
    assert event[2:] == (command, 0, 7, 0, length, b"\x25" * length)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != 1])
def test_without_payload_len_nothing_is_drained(command: int) -> None:
    length = 0 if command == 3 else 512
    event = judged(command, 0, length)
    assert event[0] == ("request" if command in spec.COMMANDS else "refused")
    assert event[-6:] == (command, 0, 7, 0, length, b"")


@pytest.mark.parametrize("command", [*COMMANDS, 2])
@pytest.mark.parametrize("length", OVERLONG)
def test_an_overlong_payload_is_not_waited_for(command: int, length: int) -> None:
    sent = request(command, 0, length, flags=LEN, style=spec.EXTENDED)
    breach(opening(spec.EXTENDED) + sent, words="more than the maximum")


@pytest.mark.parametrize("command", [1, 4, 9])
def test_the_longest_payload_is_taken_whether_it_is_due_or_not(command: int) -> None:
    payload = b"\x5a" * spec.MAX_PAYLOAD
    sent = request(command, 0, len(payload), flags=LEN, payload=payload, style=spec.EXTENDED)
    data = opening(spec.EXTENDED) + sent
    poured = pour((data,), len(data), Server({"disk": HUGE}))
    assert poured.rest == b""
    assert poured.events[-1][0] == ("request" if command == 1 else "refused")
    assert poured.events[-1][-1] == payload


@pytest.mark.parametrize("command", [4, 5, 6, 7])
@pytest.mark.parametrize("length", [2**32 - 512, 2**32, 2**32 + 512, 2**40, 2**63 - 512])
def test_lengths_on_the_disk_have_64_bits(command: int, length: int) -> None:
    assert judged(command, 0, length, export=HUGE) == ("request", command, 0, 7, 0, length, b"")


@pytest.mark.parametrize("command", [4, 5, 6, 7])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 2**63), (512, 2**63 - 512), (2**64 - 512, 512), (2**64 - 512, 2**64 - 512)],
)
def test_a_range_that_would_wrap_around_is_beyond_the_end(
    command: int, offset: int, length: int
) -> None:
    error = spec.ENOSPC if command == 6 else spec.EINVAL
    assert judged(command, offset, length, export=HUGE)[:2] == ("refused", error)


@pytest.mark.parametrize("length", [spec.MAX_PAYLOAD + 512, 2**32, 2**61])
def test_a_read_of_more_than_the_maximum_is_too_large(length: int) -> None:
    assert judged(0, 0, length, export=HUGE)[:2] == ("refused", spec.EOVERFLOW)
    assert judged(0, 0, spec.MAX_PAYLOAD, export=HUGE)[0] == "request"


@pytest.mark.parametrize("flags", [0, spec.REQ_ONE, spec.FUA])
@pytest.mark.parametrize("length", [512, SIZE, 2**32, 2**63 - 512])
def test_a_filter_of_the_chosen_context_asks_for_its_own_length(flags: int, length: int) -> None:
    payload = status_filter(length, spec.CONTEXT_ID)
    event = judged(7, 0, 12, flags=LEN | flags, payload=payload, export=HUGE)
    assert event == ("request", 7, flags, 7, 0, length, b"")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00" * 4,
        b"\x00" * 7,
        status_filter(512),
        status_filter(512, 0),
        status_filter(512, 2),
        status_filter(512, 2**32 - 1),
        status_filter(512, 1, 1),
        status_filter(512, 1, 2),
        status_filter(512, 2, 1),
        status_filter(512, 1)[:-1],
        status_filter(512, 1) + b"\x00",
        status_filter(512, *[1] * 1000),
    ],
    ids=lambda payload: payload.hex()[:48] or "empty",
)
def test_a_filter_of_anything_else_is_drained_and_invalid(payload: bytes) -> None:
    event = judged(7, 0, len(payload), flags=LEN, payload=payload)
    assert event == ("refused", spec.EINVAL, 7, 0, 7, 0, len(payload), payload)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (SIZE - 99, 100), (SIZE, 512), (512, SIZE), (0, 2**64 - 1)]
)
def test_the_length_in_a_filter_obeys_the_rules_of_the_disk(offset: int, length: int) -> None:
    payload = status_filter(length, spec.CONTEXT_ID)
    event = judged(7, offset, 12, flags=LEN, payload=payload)
    assert event[:2] == ("refused", spec.EINVAL)


def test_without_contexts_a_filter_is_drained_and_invalid() -> None:
    payload = status_filter(512, spec.CONTEXT_ID)
    event = judged(7, 0, 12, flags=LEN, payload=payload, with_contexts=False)
    assert event == ("refused", spec.EINVAL, 7, 0, 7, 0, 12, payload)


def test_a_filter_with_a_flag_that_is_not_its_own_is_invalid() -> None:
    payload = status_filter(512, spec.CONTEXT_ID)
    assert judged(7, 0, 12, flags=LEN | spec.DF, payload=payload)[:2] == ("refused", spec.EINVAL)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_payload_ends_where_its_length_says(command: int) -> None:
    # The payload looks like a request, which must not be read as one.
    inner = request(1, 0, 512, flags=LEN, style=spec.EXTENDED) * 16
    assert judged(command, 0, len(inner), flags=LEN, payload=inner)[-1] == inner


@pytest.mark.parametrize("payload", [b"", b"x", b"x" * 512])
def test_disc_ends_the_stream_with_or_without_a_payload(payload: bytes) -> None:
    read = request(0, 0, 512, style=spec.EXTENDED)
    flags = LEN if payload else 0
    disc = request(2, 0, len(payload), flags=flags, payload=payload, style=spec.EXTENDED)
    events = transmit(read + disc + read + b"garbage", style=spec.EXTENDED)
    assert [event[0] for event in events] == ["request", "closed"]


def test_a_smaller_maximum_refuses_and_drains_but_does_not_disconnect() -> None:
    # "a server SHOULD gracefully consume" what is not above the default maximum.
    export = ExportInfo("disk", SIZE, WRITABLE, max_payload=4096)
    event = judged(1, 0, 8192, flags=LEN, payload=b"w" * 8192, export=export)
    assert event[:2] == ("refused", spec.EINVAL)
    assert judged(0, 0, 8192, export=export)[:2] == ("refused", spec.EOVERFLOW)
    assert judged(6, 0, 8192, export=export)[0] == "request"


def test_a_read_only_export_drains_what_it_may_not_write() -> None:
    export = ExportInfo("disk", SIZE, TransmissionFlag(WRITABLE | spec.READ_ONLY))
    event = judged(1, 0, 512, flags=LEN, payload=b"w" * 512, export=export)
    assert event[:2] == ("refused", spec.EPERM)


@pytest.mark.parametrize("at", range(4))
def test_an_extended_request_without_its_magic_ends_the_connection(at: int) -> None:
    broken = bytearray(request(3, style=spec.EXTENDED))
    broken[at] ^= 1
    breach(opening(spec.EXTENDED) + bytes(broken), words="an extended request began with")

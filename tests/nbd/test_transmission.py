"""Requests: every rule of `nbdproxy.nbd.tables`, and that the stream stays in step.

Not covered: what is done with a request; see tests of the server.
"""

from __future__ import annotations

import itertools

import pytest

from nbdproxy.errors import ProtocolError
from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import MAX_PAYLOAD, TransmissionFlag
from nbdproxy.nbd.server import WRITABLE, ExportInfo
from nbdproxy.nbd.tables import COMMAND_RULES, refusal
from nbdproxy.requests import Command, CommandFlag, NbdErrno
from tests.nbd.wire import FLAGS, SIZE, go, pour, request, transmit

OK, EPERM, EINVAL, ENOSPC, EOVERFLOW = (
    NbdErrno.OK,
    NbdErrno.EPERM,
    NbdErrno.EINVAL,
    NbdErrno.ENOSPC,
    NbdErrno.EOVERFLOW,
)
RANGED = [Command.READ, Command.WRITE, Command.TRIM, Command.WRITE_ZEROES]
MODIFYING = [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES]
ALLOWED = {
    Command.READ: CommandFlag.FUA,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE,
}
READ_ONLY = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.CAN_MULTI_CONN
)


def outcome(
    command: int,
    offset: int = 0,
    length: int = 512,
    flags: int = 0,
    *,
    can: TransmissionFlag = WRITABLE,
    size: int = SIZE,
) -> int:
    """The error of one request, 0 if it is accepted; whatever it is, the next one is in step."""
    payload = b"p" * length if command == Command.WRITE else b""
    sent = request(command, offset, length, flags=flags, payload=payload)
    export = ExportInfo("disk", size, can)
    event, following = transmit(sent + request(Command.READ, 0, 512, cookie=99), export)
    assert following[0] == "request"
    assert following[3] == 99
    fields = (command, flags, 7, offset, length, payload)
    assert event[-6:] == fields
    if event[0] == "request":
        return OK
    assert isinstance(event[1], int)
    return event[1]


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 512), (SIZE - 512, 512), (512, 4096), (0, SIZE)]
)
def test_what_is_aligned_and_inside_is_accepted(command: int, offset: int, length: int) -> None:
    assert outcome(command, offset, length) == OK


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(("offset", "length"), [(0, 0), (512, 0), (1, 512), (0, 511), (256, 256)])
def test_what_is_empty_or_not_whole_sectors_is_invalid(
    command: int, offset: int, length: int
) -> None:
    assert outcome(command, offset, length) == EINVAL


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 512), (SIZE - 512, 1024), (2**64 - 512, 512), (2**63, 512), (512, SIZE)],
)
@pytest.mark.parametrize(
    ("command", "error"),
    [
        (Command.READ, EINVAL),
        (Command.TRIM, EINVAL),
        (Command.WRITE, ENOSPC),
        (Command.WRITE_ZEROES, ENOSPC),
    ],
)
def test_beyond_the_end_each_command_has_its_error(
    command: int, error: int, offset: int, length: int
) -> None:
    assert outcome(command, offset, length) == error


def test_misalignment_is_told_before_the_end() -> None:
    assert outcome(Command.WRITE, SIZE + 1, 512) == EINVAL


@pytest.mark.parametrize("command", sorted(ALLOWED))
@pytest.mark.parametrize("flag", [1 << bit for bit in range(16)])
def test_each_flag_is_legal_where_the_specification_says(command: int, flag: int) -> None:
    length = 0 if command == Command.FLUSH else 512
    legal = bool(flag & ALLOWED[Command(command)])
    assert outcome(command, 0, length, flags=flag) == (OK if legal else EINVAL)


def test_two_legal_flags_together_are_legal() -> None:
    both = CommandFlag.FUA | CommandFlag.NO_HOLE
    assert outcome(Command.WRITE_ZEROES, flags=both) == OK


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, 0), (1, 1)])
def test_a_flush_with_a_range_is_invalid(offset: int, length: int) -> None:
    assert outcome(Command.FLUSH, offset, length) == EINVAL


@pytest.mark.parametrize("command", [Command.CACHE, Command.BLOCK_STATUS, 8, 9, 258, 65535])
def test_an_unknown_command_is_invalid_and_has_no_payload(command: int) -> None:
    assert outcome(command, 0, 512) == EINVAL


@pytest.mark.parametrize("command", MODIFYING)
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (1, 1), (SIZE, 512)])
def test_a_read_only_export_permits_no_change(command: int, offset: int, length: int) -> None:
    assert outcome(command, offset, length, can=READ_ONLY) == EPERM


def test_a_read_only_export_reads_and_flushes() -> None:
    assert outcome(Command.READ, can=READ_ONLY) == OK
    assert outcome(Command.FLUSH, length=0, can=READ_ONLY) == OK


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (Command.FLUSH, TransmissionFlag.SEND_FLUSH),
        (Command.TRIM, TransmissionFlag.SEND_TRIM),
        (Command.WRITE_ZEROES, TransmissionFlag.SEND_WRITE_ZEROES),
    ],
)
def test_what_was_not_advertised_is_invalid(command: int, flag: TransmissionFlag) -> None:
    length = 0 if command == Command.FLUSH else 512
    assert outcome(command, 0, length, can=WRITABLE & ~flag) == EINVAL


BIG = 8 * MAX_PAYLOAD


@pytest.mark.parametrize(
    ("command", "length", "error"),
    [
        (Command.READ, MAX_PAYLOAD, OK),
        (Command.READ, MAX_PAYLOAD + 512, EOVERFLOW),
        (Command.READ, 0xFFFFFFFF, EOVERFLOW),
        (Command.TRIM, MAX_PAYLOAD + 512, OK),
        (Command.WRITE_ZEROES, 4 * MAX_PAYLOAD, OK),
    ],
)
def test_only_payloads_are_limited(command: int, length: int, error: int) -> None:
    assert outcome(command, 0, length, size=BIG) == error


def test_the_largest_write_is_taken() -> None:
    payload = bytes(MAX_PAYLOAD)
    sent = request(Command.WRITE, 0, MAX_PAYLOAD, payload=payload)
    hello = FLAGS + go(b"disk")
    exports = {"disk": ExportInfo("disk", BIG, WRITABLE)}
    events, rest, _ = pour(hello + sent, len(hello) + len(sent), exports)
    assert events[-1] == ("request", Command.WRITE, 0, 7, 0, MAX_PAYLOAD, payload)
    assert rest == b""


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 0xFFFFFFFF])
def test_a_larger_write_is_not_waited_for(length: int) -> None:
    data = FLAGS + go() + request(Command.WRITE, 0, length)
    for step in (len(data), 1):
        with pytest.raises(ProtocolError, match="more than the maximum"):
            pour(data, step)


def test_the_table_says_the_same_as_the_parser_for_every_combination() -> None:
    offsets, lengths, flags = (0, 256, SIZE - 512, SIZE), (0, 512, 1024), (0, 1, 2, 4, 33)
    for command, offset, length, flag in itertools.product(range(9), offsets, lengths, flags):
        if command == Command.DISC:
            continue
        expected = refusal(command, flag, offset, length, size=SIZE, can=int(WRITABLE))
        assert outcome(command, offset, length, flag) == expected
        assert (command in COMMAND_RULES) or expected == EINVAL


@pytest.mark.parametrize("flags", [0, 1, 65535])
def test_disc_ends_the_stream_and_nothing_is_read_behind_it(flags: int) -> None:
    read = request(Command.READ, 0, 512)
    events = transmit(read + request(Command.DISC, 5, 5, flags=flags) + read + b"garbage")
    assert [event[0] for event in events] == ["request", "closed"]


def test_requests_follow_each_other_in_order() -> None:
    sent = [
        request(Command.WRITE, 512 * n, 512 * n, cookie=n % 3, payload=bytes([n]) * 512 * n)
        for n in range(1, 20)
    ]
    events = transmit(b"".join(sent))
    assert [event[4:6] for event in events] == [(512 * n, 512 * n) for n in range(1, 20)]
    assert [event[6] for event in events] == [bytes([n]) * 512 * n for n in range(1, 20)]


@pytest.mark.parametrize("at", range(4))
def test_a_request_without_its_magic_ends_the_connection(at: int) -> None:
    broken = bytearray(request(Command.FLUSH))
    broken[at] ^= 1
    with pytest.raises(ProtocolError, match="a request began with"):
        transmit(bytes(broken))


def test_a_simple_reply_has_its_wire_form() -> None:
    expected = bytes.fromhex("67446698 0000001c 0102030405060708")
    assert codec.simple_reply(ENOSPC, 0x0102030405060708) == expected

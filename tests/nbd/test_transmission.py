"""Requests: every rule of `nbdproxy.nbd.tables` in all styles, and that the stream stays in step.

Not covered: payloads with extended headers (test_extended), and what is done with a request.
"""

from __future__ import annotations

import itertools

import pytest

from nbdproxy.nbd.constants import ReplyStyle, TransmissionFlag
from nbdproxy.nbd.export_info import READABLE, WRITABLE, ExportInfo
from nbdproxy.nbd.tables import COMMAND_RULES, FLAG_NEEDS
from nbdproxy.requests import Command
from tests.nbd import spec
from tests.nbd.wire import SIZE, Server, breach, opening, pour, request, transmit

OK, EPERM, EINVAL, ENOSPC, EOVERFLOW = 0, spec.EPERM, spec.EINVAL, spec.ENOSPC, spec.EOVERFLOW
STYLES = pytest.mark.parametrize("style", ReplyStyle)
RANGED = [number for number, says in spec.COMMANDS.items() if says.ranged]
MODIFYING = [number for number, says in spec.COMMANDS.items() if says.modifies]
READ_ONLY = TransmissionFlag(READABLE | spec.READ_ONLY)
BIG = 8 * spec.MAX_PAYLOAD


def outcome(
    command: int,
    offset: int = 0,
    length: int = 512,
    flags: int = 0,
    *,
    style: int = spec.STRUCTURED,
    can: TransmissionFlag = WRITABLE,
    size: int = SIZE,
    min_block: int = 512,
    contexts: bool | None = None,
) -> int:
    """The error of one request, 0 if it is accepted; whatever it is, the next one is in step."""
    chosen = style != spec.SIMPLE if contexts is None else contexts
    payload = b"p" * length if command == Command.WRITE else b""
    on_wire = flags | (spec.PAYLOAD_LEN if payload and style == spec.EXTENDED else 0)
    sent = request(command, offset, length, flags=on_wire, payload=payload, style=style)
    sent += request(0, 0, min_block, cookie=99, style=style)
    export = ExportInfo("disk", size, can, min_block=min_block)
    event, following = transmit(sent, export, style=style, with_contexts=chosen)
    assert following == ("request", 0, 0, 99, 0, min_block, b"")
    assert event[-6:] == (command, flags, 7, offset, length, payload)
    if event[0] == "request":
        return OK
    assert isinstance(event[1], int)
    return event[1]


def commands(numbers: list[int], style: int) -> list[int]:
    """Those that may be asked for with this style."""
    return [number for number in numbers if number != 7 or style != spec.SIMPLE]


@STYLES
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 512), (SIZE - 512, 512), (512, 4096), (0, SIZE)]
)
def test_what_is_aligned_and_inside_is_accepted(style: int, offset: int, length: int) -> None:
    for command in commands(RANGED, style):
        assert outcome(command, offset, length, style=style) == OK


@STYLES
@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(("offset", "length"), [(0, 0), (512, 0), (1, 512), (0, 511), (256, 256)])
def test_what_is_empty_or_not_whole_sectors_is_invalid(
    style: int, command: int, offset: int, length: int
) -> None:
    assert outcome(command, offset, length, style=style) == EINVAL


@STYLES
@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize("min_block", [1, 4096, 65536])
def test_the_minimum_block_is_the_exports(style: int, command: int, min_block: int) -> None:
    for offset, length in [(min_block, min_block), (0, SIZE)]:
        right = OK if command != 7 or style != spec.SIMPLE else EINVAL
        assert outcome(command, offset, length, style=style, min_block=min_block) == right
    if min_block > 1:
        for offset, length in [(min_block // 2, min_block), (0, min_block // 2), (1, min_block)]:
            assert outcome(command, offset, length, style=style, min_block=min_block) == EINVAL


@STYLES
@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 512), (SIZE - 512, 1024), (2**64 - 512, 512), (2**63, 512), (512, SIZE)],
)
def test_beyond_the_end_each_command_has_its_error(
    style: int, command: int, offset: int, length: int
) -> None:
    expected = ENOSPC if command in {Command.WRITE, Command.WRITE_ZEROES} else EINVAL
    assert outcome(command, offset, length, style=style) == expected


def test_misalignment_is_told_before_the_end() -> None:
    assert outcome(Command.WRITE, SIZE + 1, 512) == EINVAL


@STYLES
@pytest.mark.parametrize("command", sorted(spec.COMMANDS))
def test_each_flag_is_legal_where_the_specification_says(style: int, command: int) -> None:
    if not commands([command], style):
        return
    says = spec.COMMANDS[command]
    told = spec.flags_told(WRITABLE, style, contexts=True)
    for flag in (1 << bit for bit in range(16)):
        if flag == spec.PAYLOAD_LEN and style == spec.EXTENDED:
            continue
        exposed_by = ({spec.FUA: spec.SEND_FUA} | says.flags).get(flag, 0)
        legal = bool(told & exposed_by)
        length = 512 if says.ranged else 0
        found = outcome(command, 0, length, flags=flag, style=style)
        assert found == (OK if legal else EINVAL), (flag, legal)


@STYLES
@pytest.mark.parametrize("flag", sorted(FLAG_NEEDS))
def test_a_flag_that_was_not_exposed_is_invalid(style: int, flag: int) -> None:
    exposed_by = {spec.FUA: spec.SEND_FUA}
    for says in spec.COMMANDS.values():
        exposed_by |= says.flags
    if flag in {spec.DF, spec.REQ_ONE}:
        return  # what exposes them does not depend on the export
    command = Command.WRITE if flag == spec.FUA else Command.WRITE_ZEROES
    can = TransmissionFlag(WRITABLE & ~exposed_by[flag])
    assert outcome(command, flags=flag, style=style) == OK
    assert outcome(command, flags=flag, style=style, can=can) == EINVAL


def test_two_legal_flags_together_are_legal_and_a_third_spoils_them() -> None:
    both = spec.FUA | spec.NO_HOLE | spec.FAST_ZERO
    assert outcome(Command.WRITE_ZEROES, flags=both) == OK
    assert outcome(Command.WRITE_ZEROES, flags=both | spec.DF) == EINVAL


@STYLES
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, 0), (1, 1), (SIZE, 0)])
def test_a_flush_with_a_range_is_invalid(style: int, offset: int, length: int) -> None:
    assert outcome(Command.FLUSH, offset, length, style=style) == EINVAL
    assert outcome(Command.FLUSH, 0, 0, style=style) == OK


@STYLES
@pytest.mark.parametrize("command", [8, 9, 258, 65535])
def test_an_unknown_command_is_invalid_and_has_no_payload(style: int, command: int) -> None:
    assert command not in COMMAND_RULES
    assert outcome(command, 0, 512, style=style) == EINVAL


@STYLES
@pytest.mark.parametrize("command", MODIFYING)
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, 256), (SIZE, 512)])
def test_a_read_only_export_permits_no_change(
    style: int, command: int, offset: int, length: int
) -> None:
    assert outcome(command, offset, length, style=style, can=READ_ONLY) == EPERM
    even_offered = TransmissionFlag(WRITABLE | spec.READ_ONLY)
    assert outcome(command, offset, length, style=style, can=even_offered) == EPERM


@STYLES
def test_a_read_only_export_does_what_changes_nothing(style: int) -> None:
    for command in commands([0, 3, 5, 7], style):
        length = 0 if command == Command.FLUSH else 512
        assert outcome(command, length=length, style=style, can=READ_ONLY) == OK


@STYLES
@pytest.mark.parametrize("command", sorted(spec.COMMANDS))
def test_what_was_not_advertised_is_invalid(style: int, command: int) -> None:
    says = spec.COMMANDS[command]
    can = TransmissionFlag(WRITABLE & ~says.exposed_by | 1)
    length = 512 if says.ranged else 0
    offered = says.exposed_by == 1 and (command != 7 or style != spec.SIMPLE)
    assert outcome(command, 0, length, style=style, can=can) == (OK if offered else EINVAL)


@STYLES
def test_status_without_contexts_is_invalid(style: int) -> None:
    assert outcome(7, style=style, contexts=False) == EINVAL


@pytest.mark.parametrize(
    ("style", "error"), [(0, EINVAL), (1, EOVERFLOW), (2, EOVERFLOW)], ids=[0, 1, 2]
)
@pytest.mark.parametrize("length", [spec.MAX_PAYLOAD + 512, 0xFFFFFE00, 0xFFFFFFFF])
def test_a_read_of_more_than_the_maximum_is_too_large(style: int, error: int, length: int) -> None:
    assert outcome(Command.READ, 0, spec.MAX_PAYLOAD, style=style, size=BIG) == OK
    assert outcome(Command.READ, 0, length, style=style, size=BIG) == error


@STYLES
def test_what_has_no_payload_is_not_limited(style: int) -> None:
    for command in commands([4, 5, 6, 7], style):
        assert outcome(command, 0, 4 * spec.MAX_PAYLOAD, style=style, size=BIG) == OK


@STYLES
def test_a_write_of_more_than_a_smaller_maximum_is_invalid_and_drained(style: int) -> None:
    # EOVERFLOW is for READ, and for what has no payload.
    export = ExportInfo("disk", SIZE, WRITABLE, max_payload=4096)
    flags = spec.PAYLOAD_LEN if style == spec.EXTENDED else 0
    sent = request(1, 0, 4608, flags=flags, payload=b"p" * 4608, style=style)
    first, second = transmit(sent + request(0, 0, 4096, style=style), export, style=style)
    assert first[:2] == ("refused", EINVAL)
    assert second[0] == "request"


@pytest.mark.parametrize("style", [spec.SIMPLE, spec.STRUCTURED])
def test_the_largest_write_is_taken(style: int) -> None:
    payload = bytes(spec.MAX_PAYLOAD)
    data = opening(style) + request(Command.WRITE, 0, len(payload), payload=payload)
    poured = pour((data,), len(data), Server({"disk": ExportInfo("disk", BIG, WRITABLE)}))
    assert poured.events[-1] == ("request", Command.WRITE, 0, 7, 0, len(payload), payload)
    assert poured.rest == b""


@pytest.mark.parametrize("style", [spec.SIMPLE, spec.STRUCTURED])
@pytest.mark.parametrize("length", [spec.MAX_PAYLOAD + 1, 0xFFFFFFFF])
def test_a_larger_write_is_not_waited_for(style: int, length: int) -> None:
    breach(opening(style) + request(Command.WRITE, 0, length), words="more than the maximum")


@STYLES
@pytest.mark.parametrize("flags", [0, 1, 64, 65535 - spec.PAYLOAD_LEN])
def test_disc_ends_the_stream_and_nothing_is_read_behind_it(style: int, flags: int) -> None:
    read = request(Command.READ, 0, 512, style=style)
    disc = request(Command.DISC, 5, 5, flags=flags, style=style)
    events = transmit(read + disc + read + b"garbage", style=style)
    assert [event[0] for event in events] == ["request", "closed"]


@STYLES
def test_requests_follow_each_other_in_order(style: int) -> None:
    flags = spec.PAYLOAD_LEN if style == spec.EXTENDED else 0
    payloads = [bytes([n]) * 512 * n for n in range(1, 20)]
    sent = [
        request(1, len(data), len(data), cookie=n % 3, flags=flags, payload=data, style=style)
        for n, data in enumerate(payloads)
    ]
    events = transmit(b"".join(sent), style=style)
    assert [event[4:6] for event in events] == [(len(data), len(data)) for data in payloads]
    assert [event[6] for event in events] == payloads


@pytest.mark.parametrize("style", [spec.SIMPLE, spec.STRUCTURED])
@pytest.mark.parametrize("at", range(4))
def test_a_request_without_its_magic_ends_the_connection(style: int, at: int) -> None:
    broken = bytearray(request(Command.FLUSH))
    broken[at] ^= 1
    before = request(Command.READ, 0, 512)
    events = breach(opening(style) + before + bytes(broken), words="a request began with")
    assert events[-1] == ("request", 0, 0, 7, 0, 512, b"")


@STYLES
def test_every_combination_is_judged_as_the_specification_says(style: int) -> None:
    told = spec.flags_told(WRITABLE, style, contexts=style != spec.SIMPLE)
    terms = spec.Terms(SIZE, told, style, style != spec.SIMPLE, min_block=512)
    offsets, lengths, flags = (0, 256, SIZE - 512, SIZE), (0, 512, 1024), (0, 1, 2, 4, 8, 16, 65)
    for command, offset, length, flag in itertools.product(range(9), offsets, lengths, flags):
        if command == Command.DISC:
            continue
        payload = b"" if command == Command.WRITE and length else None
        asked = spec.Asked(command, flag, offset, length, payload)
        right = spec.errors(terms, asked)
        found = outcome(command, offset, length, flag, style=style)
        assert found in right if right else found == OK, asked

"""What a server must make of a stream, unit by unit, by `tests.nbd.spec`.

`ServerModel` is told of each unit (the client's flags, an option, a request) and what the server
made of it, and fails where the two differ: in what is asked, in an answer, in the fields and errors
of a request, or in how many bytes the unit has.

Not covered: how the bytes arrive; `targets` feeds them in several ways.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import Enum, auto

from nbdproxy.nbd.export_info import ExportInfo
from tests.nbd import spec
from tests.nbd.wire import (
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    REQUEST_MAGIC,
    Plain,
    kinds,
    taken_apart,
)

MAX_OPTION_DATA, MAX_OPTIONS = 64 * 1024, 32


class Stage(Enum):
    """What kind of unit comes next."""

    FLAGS = auto()
    OPTION = auto()
    REQUEST = auto()
    OVER = auto()


class ServerModel:
    """One connection, seen by somebody who reads the specification along with it."""

    def __init__(self, exports: Mapping[str, ExportInfo], tls: int) -> None:
        self.stage = Stage.FLAGS
        self.handshake_due = False
        self._exports = {name.encode(): export for name, export in exports.items()}
        self._bargain = spec.Bargain(list(self._exports), tls)
        self._options = 0
        self._zeroes = True
        self._terms: spec.Terms | None = None

    @property
    def head(self) -> int:
        """Bytes of the next unit's header."""
        if self.stage is Stage.REQUEST:
            return 32 if self._bargain.style == spec.EXTENDED else 28
        return 4 if self.stage is Stage.FLAGS else 16

    def size(self, head: bytes) -> int | None:
        """Bytes of the unit that begins with `head`; None if it breaks the protocol."""
        if self.stage is Stage.FLAGS:
            (flags,) = struct.unpack(">I", head)
            return 4 if flags <= 3 else None
        if self.stage is Stage.OPTION:
            magic, _, length = struct.unpack(">QII", head)
            legal = magic == IHAVEOPT and length <= MAX_OPTION_DATA and self._options < MAX_OPTIONS
            return 16 + int(length) if legal else None
        extended = self._bargain.style == spec.EXTENDED
        form, expected = (
            (">IHHQQQ", EXTENDED_REQUEST_MAGIC) if extended else (">IHHQQI", REQUEST_MAGIC)
        )
        magic, flags, command, _, _, length = struct.unpack(form, head)
        payload = command == 1 or (extended and bool(flags & spec.PAYLOAD_LEN))
        if magic != expected or (payload and length > spec.MAX_PAYLOAD):
            return None
        return len(head) + (int(length) if payload else 0)

    def check(self, unit: bytes, events: list[Plain], breach: str) -> None:
        """Compare what a whole unit was taken for with what it is."""
        if self.stage is Stage.FLAGS:
            assert (events, breach) == ([], "")
            self._zeroes = not unit[3] & 2
            self._bargain.fixed = bool(unit[3] & 1)
            self.stage = Stage.OPTION
        elif self.stage is Stage.OPTION:
            self._option(unit, taken_apart(events), breach)
        else:
            assert not breach
            (event,) = events
            self._request(unit, event)

    def _option(self, unit: bytes, events: list[Plain], breach: str) -> None:
        self._options += 1
        number, body = int.from_bytes(unit[8:12]), unit[16:]
        right = self._bargain.answers(number, body)
        if breach:
            assert right == {spec.ENDS}
            assert not events
            self.stage = Stage.OVER
            return
        filters = self._bargain.filter_told(number, body)
        self._bargain_reached(number, body, right, events)
        if right == {spec.HELLO}:
            assert kinds(events) == ["send", "opened"]
            zeroes = bytes(124) if self._zeroes else b""
            assert events[0][1] == self._size_and_flags(self._bargain.chosen) + zeroes
            self._opened(events)
            return
        replies = [event for event in events if event[0] == "reply"]
        assert {event[1] for event in replies} == {number}
        if right != {spec.ACK}:
            assert len(events) == 1
            return
        assert replies[-1][3] == b""
        behind = {2: ["closed"], 5: ["starttls"], 7: ["opened"]}.get(number, [])
        assert kinds(events)[len(replies) :] == behind
        told = [(event[2], event[3]) for event in replies[:-1]]
        if number in {6, 7}:
            self._infos(body, [data for _, data in told], filters)
        else:
            self._told(number, body, told)
        self.handshake_due = number == 5
        if number == 2:
            self.stage = Stage.OVER
        elif number == 7:
            self._opened(events)

    def _bargain_reached(
        self, number: int, body: bytes, right: frozenset[int], events: list[Plain]
    ) -> None:
        final = spec.HELLO if number == 1 else [k for k in kinds(events) if isinstance(k, int)][-1]
        assert final in right, f"option {number} was answered with {final:#x}"
        self._bargain.asked(number, body, int(final))

    def _told(self, number: int, body: bytes, told: list[tuple[object, object]]) -> None:
        """Check what came before the ACK of an option."""
        if number == 3:
            assert told == [
                (
                    spec.SERVER,
                    struct.pack(">I", len(name)) + name + export.description.encode(),
                )
                for name, export in self._exports.items()
            ]
        elif number in {9, 10}:
            context_id = spec.CONTEXT_ID if number == 10 else 0
            expected = (spec.META_CONTEXT, struct.pack(">I", context_id) + spec.CONTEXT)
            assert told == [expected] * self._bargain.contexts_told(number, body)
        else:
            assert told == []

    def _infos(self, body: bytes, told: list[object], filters: frozenset[bool]) -> None:
        asked_for = spec.infos_of(body) or b""
        name = self._bargain.find(asked_for)
        assert name is not None
        export = self._exports[name]
        begin = 4 + len(asked_for) + 2
        asked = {int.from_bytes(body[at : at + 2]) for at in range(begin, len(body), 2)}
        sizes = export.min_block, export.preferred, export.max_payload
        expected: list[object] = [struct.pack(">HIII", 3, *sizes)]
        if 1 in asked:
            expected.append(struct.pack(">H", 1) + name)
        if 2 in asked and export.description:
            expected.append(struct.pack(">H", 2) + export.description.encode())
        flags = spec.flags_told(int(export.flags), self._bargain.style, contexts=False)
        one_of = [
            struct.pack(">HQH", 0, export.size, flags | spec.BLOCK_STATUS_PAYLOAD * offered)
            for offered in filters
        ]
        (size_and_flags,) = [data for data in told if data not in expected]
        assert size_and_flags in one_of
        assert {*told} == {*expected, size_and_flags}
        assert len(told) == len(expected) + 1

    def _size_and_flags(self, name: bytes | None) -> bytes:
        assert name is not None
        export, style = self._exports[name], self._bargain.style
        chosen = self._bargain.context_of == name
        flags = spec.flags_told(int(export.flags), style, contexts=chosen)
        return struct.pack(">QH", export.size, flags)

    def _opened(self, events: list[Plain]) -> None:
        name = self._bargain.chosen
        assert name is not None
        assert events[-1] == ("opened", name.decode())
        export, style = self._exports[name], self._bargain.style
        chosen = self._bargain.context_of == name
        flags = spec.flags_told(int(export.flags), style, contexts=chosen)
        sizes = export.min_block, export.max_payload
        self._terms = spec.Terms(export.size, flags, style, chosen, *sizes)
        self.stage = Stage.REQUEST

    def _request(self, unit: bytes, event: Plain) -> None:
        assert self._terms is not None
        extended = self._terms.style == spec.EXTENDED
        form = ">IHHQQQ" if extended else ">IHHQQI"
        _, flags, command, cookie, offset, length = struct.unpack_from(form, unit)
        if command == 2:
            assert event == ("closed",)
            self.stage = Stage.OVER
            return
        has_payload = command == 1 or (extended and bool(flags & spec.PAYLOAD_LEN))
        payload = unit[self.head :] if has_payload else None
        asked = spec.Asked(command, flags, offset, length, payload)
        wrong = spec.errors(self._terms, asked)
        plain_flags, effect, _ = spec.effect(self._terms, asked)
        if wrong:
            assert event[:2] == ("refused", event[1])
            assert event[1] in wrong, f"{asked} was refused with {event[1]}"
            told_length = event[6]
            assert event[2:] == (command, plain_flags, cookie, offset, told_length, event[-1])
            assert told_length in {length, effect}
            assert event[-1] in {payload or b"", b""}
        else:
            kept = payload if command == 1 else b""
            expected = ("request", command, plain_flags, cookie, offset, effect, kept)
            assert event == expected, f"{asked} was not accepted as it is"

"""A client's stream into the server core.

The first byte chooses exports and TLS mode, the second how the bytes are split, the rest is what
the client sends.

Fed unit by unit it must mean what `ServerModel` says; fed in any other way it must mean the same.
Never more is used than was given, `needed` is exact and bounded, behind a breach nothing is read.
"""

from __future__ import annotations

from typing import NamedTuple

from nbdproxy.nbd.constants import TlsMode, TransmissionFlag
from nbdproxy.nbd.export_info import READABLE, WRITABLE, ExportInfo
from nbdproxy.nbd.server import Phase, ServerConnection
from tests.fuzz.server_model import ServerModel, Stage
from tests.nbd import spec
from tests.nbd.wire import Plain, Server, plain

MIB = 1024 * 1024
_EXPORTS: tuple[dict[str, ExportInfo], ...] = (
    {
        "disk": ExportInfo("disk", MIB, WRITABLE, "the first"),
        "other": ExportInfo("other", 2 * MIB, WRITABLE),
    },
    {"disk": ExportInfo("disk", MIB, TransmissionFlag(READABLE | spec.READ_ONLY))},
    {"": ExportInfo("", 2**63 - 512, WRITABLE), "disk": ExportInfo("disk", 0, WRITABLE)},
    {
        "disk": ExportInfo(
            *("disk", 2**40, TransmissionFlag(1)),
            min_block=4096,
            max_payload=8192,
        )
    },
    {"x" * 4096: ExportInfo("x" * 4096, MIB, WRITABLE)},
    {},
)
SERVERS = [Server(exports, tls) for exports in _EXPORTS for tls in TlsMode]
"""What the first byte of an input for `server` chooses from."""

STEPS = (0, 1, 2, 3, 4, 5, 7, 11, 15, 16, 17, 27, 28, 29, 31, 32, 33, 60, 61, 100)
OWED = (None, 1, 4096, 65_536)
"""What the second byte chooses from: how many bytes come at a time (0: all), and `owed`."""

PIECES = 128
"""As many pieces of a long stream are enough, so that an input takes about a millisecond."""

_NEEDED_MAX = 32 * MIB + 32


class Meaning(NamedTuple):
    """What a stream meant."""

    events: list[Plain]
    rest: bytes
    phase: Phase
    breach: str


def meaning(data: bytes) -> Meaning:
    """What a stream means, fed unit by unit and compared with the model."""
    return _unit_by_unit(SERVERS[data[0] % len(SERVERS)], data[2:])[1]


def run(data: bytes) -> None:
    """One client's stream, fed unit by unit and in another way."""
    if len(data) < 2:
        return
    setup = SERVERS[data[0] % len(SERVERS)]
    parts, meant = _unit_by_unit(setup, data[2:])
    owed = OWED[data[1] // len(STEPS) % len(OWED)]
    assert _refed(setup, parts, step_of(data), owed) == meant
    if len(parts) > 1:
        connection = ServerConnection(setup.exports, tls=setup.tls)
        connection.receive(memoryview(parts[0] + (parts[1] or b"\x16")))
        assert "before STARTTLS was answered" in str(connection.breach)


def step_of(data: bytes) -> int:
    """How many bytes of an input come at a time."""
    return max(STEPS[data[1] % len(STEPS)] or len(data), len(data) // PIECES)


def _unit_by_unit(setup: Server, data: bytes) -> tuple[list[bytes], Meaning]:
    """Feed exactly what is needed; the parts between TLS handshakes, and what it meant."""
    connection = ServerConnection(setup.exports, tls=setup.tls)
    model = ServerModel(setup.exports, setup.tls)
    meant: list[Plain] = []
    begin = at = 0
    parts = []
    while model.stage is not Stage.OVER:
        assert connection.breach is None
        assert connection.needed <= model.head
        size = _step(connection, model, data, at, meant)
        if not size:
            break
        at += size
        if model.handshake_due:
            assert connection.phase is Phase.TLS
            connection.tls_started()
            model.handshake_due = False
            parts.append(data[begin:at])
            begin = at
    over = connection.phase is Phase.CLOSED
    assert over == (model.stage is Stage.OVER or connection.breach is not None)
    rest = b"" if over else data[at:]
    breach = str(connection.breach or "")
    if over:
        assert connection.receive(memoryview(b"more")) == (4, [])
        assert str(connection.breach or "") == breach
    parts.append(data[begin:])
    return parts, Meaning(meant, rest, connection.phase, breach)


def _step(
    connection: ServerConnection, model: ServerModel, data: bytes, at: int, meant: list[Plain]
) -> int:
    """Feed the unit at `at`; its size, or 0 if it is the last one that has a meaning."""
    head = data[at : at + model.head]
    if len(head) < model.head:
        assert connection.receive(memoryview(head)) == (0, [])
        return 0
    size = model.size(head)
    if size is None:
        assert connection.receive(memoryview(head)) == (len(head), [])
        assert connection.breach is not None
        return 0
    if size > len(head):
        assert connection.receive(memoryview(head)) == (0, [])
        assert connection.needed == size <= _NEEDED_MAX
    unit = data[at : at + size]
    used, found = connection.receive(memoryview(unit))
    if len(unit) < size:
        assert (used, found) == (0, [])
        return 0
    assert used == size
    events = [plain(event) for event in found]
    meant += events
    model.check(unit, events, str(connection.breach or ""))
    return size


def _refed(setup: Server, parts: list[bytes], step: int, owed: int | None) -> Meaning:
    """Feed `step` bytes at a time; with `owed`, what was not taken is handed in again."""
    connection = ServerConnection(setup.exports, tls=setup.tls)
    events: list[Plain] = []
    rest = b""
    for number, part in enumerate(parts):
        if number:
            assert not rest
            connection.tls_started()
        for at in range(0, len(part), step):
            rest += part[at : at + step]
            more = True
            while more:
                given = memoryview(rest)
                used, found = connection.receive(given, **({"owed": owed} if owed else {}))
                assert 0 <= used <= len(rest)
                assert connection.needed <= _NEEDED_MAX
                events += [plain(event) for event in found]
                rest = rest[used:]
                more = bool(owed and used and rest)
            assert connection.phase is Phase.CLOSED or connection.needed > len(rest)
    return Meaning(events, rest, connection.phase, str(connection.breach or ""))

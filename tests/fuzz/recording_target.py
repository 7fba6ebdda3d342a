"""A recording from somebody else, through all that reads one: only our own errors may come.

An input is, as `encoded` writes it: which command reads it, how many slots, their fields, and the
data stream. Checksums and digests are made right, or nothing behind the first one would be reached,
and `mutated` changes fields and moves slots as wholes. What is refused is refused in one place, so
only what opens is handed to a command: to one of them, or to all where the input says so.
"""

from __future__ import annotations

import contextlib
import io
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from nbdproxy.cli.audit import audit
from nbdproxy.cli.check import check
from nbdproxy.cli.convert import convert
from nbdproxy.cli.explain import explain
from nbdproxy.cli.info import info
from nbdproxy.cli.log import log
from nbdproxy.cli.manifest import manifest
from nbdproxy.cli.pack import pack, unpack
from nbdproxy.cli.replay import replay
from nbdproxy.errors import NbdproxyError
from nbdproxy.recording.foreign.formats import LogFormat
from nbdproxy.recording.reader import Recording
from tests.fuzz.scratch import folder
from tests.support.forging import SLOT, sealed

_HEAD = struct.Struct("<BH")
ALL = 255
"""Stands for all commands, in the place of the number of one."""
_EDGES = (0, 1, 2, 511, 512, 4096, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 512, 2**64 - 1)
_BITS = (8, 8, 16, 32, 64, 64, 64, 64, 64, 64)
"""Of a slot's fields."""


def encoded(slots: Sequence[Sequence[int]], data: bytes, command: int = ALL) -> bytes:
    """The input of these slots."""
    return _HEAD.pack(command, len(slots)) + b"".join(SLOT.pack(*one) for one in slots) + data


def decoded(given: bytes) -> tuple[list[tuple[int, ...]], bytes, int]:
    """The slots, the data stream and the command of an input, whatever that is."""
    command, count = _HEAD.unpack_from(given.ljust(_HEAD.size, b"\0"))
    count = max(min(count, (len(given) - _HEAD.size) // SLOT.size), 0)
    end = _HEAD.size + count * SLOT.size
    return [*SLOT.iter_unpack(given[_HEAD.size : end])], given[end:], command


def run(given: bytes) -> None:
    """Open the recording that an input is, and have it read by the command that it names."""
    slots, data, command = decoded(given)
    with folder() as at:
        run = at / "run"
        run.mkdir()
        (run / "events").write_bytes(sealed(slots, data))
        (run / "data").write_bytes(data)
        with contextlib.suppress(NbdproxyError), Recording(run) as recording:
            read_by(run, command)
            recording.verify()


def mutated(given: bytes, longest: int, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """Change an input as a recording: a field, the order of slots, a text, or any bytes.

    `mutate` changes bytes, and makes them no longer than it is told.
    """
    rng = random.Random(seed)
    slots, data, command = decoded(given)
    rows = [list(slot) for slot in slots]
    kind = rng.randrange(8) if rows else 7
    row = rng.randrange(len(rows)) if rows else 0
    if kind < 4:
        field = rng.randrange(len(_BITS))
        old = rng.choice([rows[row][field], rng.choice(rows)[field], rng.choice(_EDGES)])
        rows[row][field] = (old + rng.choice([0, 0, 1, -1, 512, -512])) % 2 ** _BITS[field]
    elif kind == 4:
        rows.insert(rng.randrange(len(rows) + 1), list(rng.choice(rows)))
    elif kind == 5:
        del rows[row]
    elif kind == 6:
        # Behind the rest, so that no other text moves.
        length, position = rows[row][6], rows[row][8]
        text = mutate(data[position : position + length][:4096] or b"{}", 4096)
        rows[row][6], rows[row][8] = len(text), len(data)
        data += text
    else:
        return mutate(given, longest)
    return encoded(rows, data, rng.choice([command, rng.randrange(ALL)]))[:longest]


def read_by(run: Path, number: int = ALL) -> None:
    """Let a command read a recording, or all; what it writes goes beside it."""
    files, at = run.with_name("files"), run.with_name
    files.write_text(f"{'0' * 64}  /a\n")
    commands: list[Callable[[], object]] = [
        lambda: info(run, verify=True, json=True),
        lambda: info(run),
        lambda: log(run),
        lambda: log(run, json=True),
        lambda: pack(run, at("packed")),
        lambda: unpack(at("packed"), at("out")),
        lambda: convert(run, at("dm"), LogFormat.DM_LOG_WRITES),
        lambda: convert(run, at("trlog"), LogFormat.NBD_TRLOG),
        lambda: manifest(f"{run}@end"),
        lambda: check(run, fsck=False),
        lambda: replay([run], files, root="/", at="end"),
        lambda: explain(run, ["/a"], files, root="/"),
        lambda: audit(run, str(run / "data")),
    ]
    chosen = number % len(commands)
    # What is unpacked was packed before.
    for command in commands if number == ALL else commands[chosen - (chosen == 5) : chosen + 1]:
        told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
        with (
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(NbdproxyError, typer.Exit),
        ):
            command()

"""A recording from somebody else, through all that reads one: only our own errors may come.

An input is, as `encoded` writes it: how many slots, their fields, and the data stream. Checksums
and digests are made right, or nothing behind the first one would be reached.
"""

from __future__ import annotations

import contextlib
import io
import struct
import tempfile
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
from tests.support.forging import SLOT, sealed

_COUNT = struct.Struct("<H")


def encoded(slots: Sequence[Sequence[int]], data: bytes) -> bytes:
    """The input of these slots."""
    return _COUNT.pack(len(slots)) + b"".join(SLOT.pack(*slot) for slot in slots) + data


def run(given: bytes) -> None:
    """Open the recording that an input is, with every command that reads one."""
    count = _COUNT.unpack_from(given.ljust(_COUNT.size, b"\0"))[0]
    count = min(count, (len(given) - _COUNT.size) // SLOT.size)
    end = _COUNT.size + max(count, 0) * SLOT.size
    slots = [SLOT.unpack_from(given, at) for at in range(_COUNT.size, end, SLOT.size)]
    with tempfile.TemporaryDirectory(prefix="nbdproxy-fuzz-") as name:
        folder = Path(name) / "run"
        folder.mkdir()
        (folder / "events").write_bytes(sealed(slots, given[end:]))
        (folder / "data").write_bytes(given[end:])
        read_by_all(folder)


def read_by_all(run: Path) -> None:
    """Let each command read a recording; what it writes goes beside it."""
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
    for command in commands:
        told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
        with (
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(NbdproxyError, typer.Exit),
        ):
            command()

"""Attacks by a hostile server upstream, on servers that pass on another server's export.

The server under test may refuse to start, refuse its own clients or answer them with an error. It
must not die by a signal or an exception, hang, or pass a lie on.

Not covered: a server upstream that is merely slow or far away.
"""

from __future__ import annotations

import struct

from tests.blackbox.bench import Bench
from tests.blackbox.check import Feature, Level, check
from tests.blackbox.hostile import Hostile, Plan
from tests.blackbox.ops import STATUS, Op
from tests.blackbox.running import Running, StartError
from tests.blackbox.servers import Setup
from tests.blackbox.transmit import Style
from tests.blackbox.wire import AbsentError, ClosedError, SilentError

CARE = Level.CARE
ROOM = Feature.ATTACKS
AFTERMATH_S = 0.2
"""Seconds after the attack in which a server's death is laid to it."""


def _against(bench: Bench, plan: Plan) -> str:
    """Return how a server meets a plan: "refused", or the word BLOCK_STATUS is answered with."""
    with Hostile(bench.new_path(), plan) as hostile:
        running = bench.launch(Setup(size=1 << 20, upstream=hostile.uri))
        try:
            running.started()
            word = _asked(bench, running)
        except StartError:
            word = "refused"
        if running.wait(AFTERMATH_S) and not running.failed_in_order():
            return f"crash: {running.ending()}: {running.last_words}"
        running.kill()
        return f"crash: {running.last_words}" if "Traceback" in running.said else word


def _asked(bench: Bench, running: Running) -> str:
    try:
        client = bench.enter(running, style=Style.STRUCTURED, status=True)
        word = client.word(Op(STATUS, 0, 65536))
        client.wire.close()
    except (AbsentError, ClosedError):
        return "refused"
    except SilentError:
        return "hangs"
    return "passes" if client.size >= 1 << 63 and word == "OK" else word


def _all(bench: Bench, plans: dict[str, Plan], allowed: set[str]) -> str:
    words = {what: _against(bench, plan) for what, plan in plans.items()}
    odd = {what: word for what, word in words.items() if word not in allowed}
    return f"wrong: {odd}" if odd else f"survives: {', '.join(sorted(set(words.values())))}"


@check(
    "upstream",
    ROOM,
    CARE,
    "A good server upstream is passed on, so that the next three checks mean something",
)
def upstream(bench: Bench) -> str:
    word = _against(bench, Plan())
    return "yes" if word == "OK" else word


@check(
    "CVE-2023-5871",
    ROOM,
    CARE,
    "A server upstream that answers BLOCK_STATUS with crafted extents",
    right=("survives",),
    seconds=30.0,
)
def crafted_extents(bench: Bench) -> str:
    long = struct.pack(">I", 1) + struct.pack(">II", 0xFFFFFFFF, 0) * 1000
    plans = {
        "an extent of nothing": Plan(extents=struct.pack(">3I", 1, 0, 0)),
        "no extents": Plan(extents=struct.pack(">I", 1)),
        "half an extent": Plan(extents=struct.pack(">3I", 1, 4096, 0) + b"\0\0\0"),
        "an unknown context": Plan(extents=struct.pack(">3I", 7, 4096, 0)),
        "extents past the end": Plan(extents=long),
        "a chunk of 4 GiB": Plan(extents=struct.pack(">I", 1), said_length=0xFFFFFFFC),
    }
    return _all(bench, plans, {"OK", "EIO", "EINVAL", "ESHUTDOWN", "refused"})


@check(
    "CVE-2023-5215",
    ROOM,
    CARE,
    "A server upstream whose export has 2^63 bytes or more",
    right=("survives",),
    seconds=30.0,
)
def huge_size(bench: Bench) -> str:
    plans = {f"{size:#x} bytes": Plan(size=size) for size in (1 << 63, (1 << 64) - 1)}
    return _all(bench, plans, {"refused", "EIO", "EINVAL"})


@check(
    "CVE-2021-20286",
    ROOM,
    CARE,
    "A server upstream that goes away in the middle of the options",
    right=("survives",),
    seconds=30.0,
)
def death_during_options(bench: Bench) -> str:
    plans = {f"after {count} options": Plan(options=count) for count in range(3)}
    return _all(bench, plans, {"refused"})

"""What a check is, the table of all checks, and how one is run.

A check is a function that gets a `Bench` and returns a word, or "word: detail". What it did not
expect comes out of the connection as an exception and becomes a word, too: "closed", "hangs",
"violation", "crash". The word decides: `right` words are what nbdproxy has to say; `legal` words
the specification allows; "no" means that the feature is not offered; all others are faults.

Not covered: exceptions that are the suite's own faults; they pass through.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.blackbox.bench import Bench, CrashError
from tests.blackbox.running import StartError
from tests.blackbox.transmit import Style
from tests.blackbox.wire import AbsentError, ClosedError, SilentError, ViolationError

SECONDS = 10.0
"""A check's time where it says no other."""


AFTERMATH_S = 0.1
"""Seconds after an attack, or a hang-up, in which a server's death is laid to it."""


class Level(enum.Enum):
    """How much a rule binds. CARE: not in the specification, but a careful server does it."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    MAY = "MAY"
    CARE = "care"


class Feature(enum.Enum):
    """The lines of the table, in its order."""

    HANDSHAKE = "fixed newstyle, NO_ZEROES, EXPORT_NAME, LIST, ABORT"
    CLIENT_FLAGS = "an unknown client flag drops the connection"
    GO = "INFO and GO with NAME, DESCRIPTION, BLOCK_SIZE"
    TLS = "STARTTLS off, optional, required; X.509"
    READ_WRITE = "READ, WRITE, pipelines, 32 MiB"
    STRUCTURED = "STRUCTURED_REPLY, error strings, OFFSET_HOLE"
    META = "META_CONTEXT, BLOCK_STATUS of base:allocation"
    EXTENDED = "EXTENDED_HEADERS, BLOCK_STATUS_PAYLOAD"
    DURABLE = "FLUSH, FUA, TRIM, WRITE_ZEROES"
    HINTS = "CACHE, FAST_ZERO, DF"
    MULTI_CONN = "MULTI_CONN on a writable export"
    PAST_END = "a write past the end gives ENOSPC"
    ERRORS = "the other errors: EINVAL, EPERM, in step afterwards"
    FLUSH_LENGTH = "FLUSH with a length gives EINVAL"
    DISC = "DISC completes what is in flight"
    STOP = "a stop is orderly"
    CAP = "a cap on options before GO"
    ATTACKS = "attacks are survived"


class Verdict(enum.Enum):
    """What a word means for the server that said it."""

    RIGHT = "right"
    LEGAL = "legal"
    ABSENT = "absent"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Check:
    """One check; `says` is the specification's section and what it says there."""

    id: str
    feature: Feature
    level: Level
    says: str
    right: tuple[str, ...]
    legal: tuple[str, ...]
    seconds: float
    function: Callable[[Bench], str]


@dataclass(frozen=True, slots=True)
class Result:
    """What a check found in a server; `transcript` is the last that passed, for evidence."""

    check: Check
    server: str
    word: str
    detail: str
    verdict: Verdict
    transcript: tuple[str, ...]
    seconds: float


CHECKS: dict[str, Check] = {}


def check(
    identity: str,
    feature: Feature,
    level: Level,
    says: str,
    *,
    right: tuple[str, ...] = ("yes",),
    legal: tuple[str, ...] = (),
    seconds: float = SECONDS,
) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Enter the function below into the table."""

    def enter(function: Callable[[Bench], str]) -> Callable[[Bench], str]:
        assert identity not in CHECKS, f"two checks are called {identity}"
        CHECKS[identity] = Check(identity, feature, level, says, right, legal, seconds, function)
        return function

    return enter


def check_styles(
    identity: str,
    feature: Feature,
    level: Level,
    says: str,
    *,
    right: tuple[str, ...] = ("yes",),
    legal: tuple[str, ...] = (),
    seconds: float = SECONDS,
) -> Callable[[Callable[[Bench, Style], str]], Callable[[Bench, Style], str]]:
    """Enter the function below three times: with simple, structured and extended replies."""

    def enter(function: Callable[[Bench, Style], str]) -> Callable[[Bench, Style], str]:
        rooms = {Style.STRUCTURED: Feature.STRUCTURED, Style.EXTENDED: Feature.EXTENDED}
        for style in Style:
            prefix = "" if style is Style.SIMPLE else f"{style.name.lower()}-"

            def run_styled(bench: Bench, style: Style = style) -> str:
                return function(bench, style)

            room = rooms.get(style, feature)
            register = check(
                prefix + identity, room, level, says, right=right, legal=legal, seconds=seconds
            )
            register(run_styled)
        return function

    return enter


def run(what: Check, bench: Bench) -> Result:
    """Run a check against a server; the suite's own faults are raised."""
    begun = time.monotonic()
    bench.begin(what.id, what.seconds)
    absent = False
    try:
        word, _, detail = what.function(bench).partition(": ")
    except AbsentError as error:
        word, detail, absent = "no", str(error), True
    except ViolationError as error:
        word, detail = "violation", str(error)
    except ClosedError as error:
        word, detail = "closed", str(error)
    except SilentError as error:
        word, detail = "hangs", str(error)
    except StartError as error:
        word, detail = "no start", str(error)
    except CrashError as error:
        word, detail = "crash", str(error)
    transcript = tuple(bench.clock.transcript)
    try:
        suspect = word == "closed" or what.feature in {Feature.ATTACKS, Feature.TLS}
        bench.settle(AFTERMATH_S if suspect else 0)
    except CrashError as error:
        word, detail, absent = "crash", f"{error}" + (f" ({detail})" if detail else ""), False
    verdict = Verdict.ABSENT if absent else _judge(what, word)
    took = time.monotonic() - begun
    return Result(what, bench.kind.name, word, detail, verdict, transcript, took)


def _judge(what: Check, word: str) -> Verdict:
    if word in what.right:
        return Verdict.RIGHT
    return Verdict.LEGAL if word in what.legal else Verdict.WRONG

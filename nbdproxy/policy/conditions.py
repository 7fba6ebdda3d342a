"""When a rule strikes: the conditions, and the table that drives loader and manual.

All conditions of a rule must hold. They are asked in three steps: does the request fit (command,
flags, place, payload, connection), is it the time (events, seconds), and is it its turn. A rule
counts the requests that pass the first two, and turns are by that count: never by what other rules
saw, and never by the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nbdproxy.policy.keys import Form, PolicyKey
from nbdproxy.requests import Command, CommandFlag


class CommandWord(Enum):
    """The commands, as a file names them."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    TRIM = "trim"
    CACHE = "cache"
    WRITE_ZEROES = "write-zeroes"
    BLOCK_STATUS = "block-status"

    @property
    def command(self) -> Command:
        """The command itself."""
        return Command[self.name]


class FlagWord(Enum):
    """The flags, as a file names them."""

    FUA = "fua"
    NO_HOLE = "no-hole"
    DF = "df"
    REQ_ONE = "req-one"
    FAST_ZERO = "fast-zero"

    @property
    def flag(self) -> CommandFlag:
        """The flag itself."""
        return CommandFlag[self.name]


class PayloadKind(Enum):
    """What a WRITE carries."""

    ZERO = "zero"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Conditions:
    """When a rule strikes; `CONDITION_KEYS` says what each means. None asks nothing."""

    commands: frozenset[Command]
    flags: int = 0
    without_flags: int = 0
    ranges: tuple[tuple[int, int], ...] | None = None
    region: str | None = None
    file: str | None = None
    block_share: float | None = None
    until_written: bool = False
    connection: int | None = None
    payload: PayloadKind | None = None
    contains: bytes | None = None
    since: str | None = None
    until: str | None = None
    after_s: float | None = None
    before_s: float | None = None
    nth: int | None = None
    every: int | None = None
    after_count: int | None = None
    before_count: int | None = None
    after_bytes: int | None = None
    before_bytes: int | None = None
    probability: float | None = None
    times: int | None = None

    @property
    def has_place(self) -> bool:
        """Whether it asks where a request goes."""
        return any(
            place is not None for place in (self.ranges, self.region, self.file, self.block_share)
        )

    @property
    def always_in_time(self) -> bool:
        """Whether it strikes each request that fits: it asks for no event, time or turn."""
        turns = (
            self.since,
            self.until,
            self.after_s,
            self.before_s,
            self.nth,
            self.every,
            self.after_count,
            self.before_count,
            self.after_bytes,
            self.before_bytes,
            self.probability,
            self.times,
        )
        return all(turn is None for turn in turns) and not self.until_written


CONDITION_KEYS: dict[str, PolicyKey] = {
    "command": PolicyKey(
        Form.CHOICES, "what is asked; default: all that the action can strike", choices=CommandWord
    ),
    "flags": PolicyKey(Form.CHOICES, "flags that must all be set", choices=FlagWord),
    "without_flags": PolicyKey(Form.CHOICES, "flags none of which may be set", choices=FlagWord),
    "range": PolicyKey(Form.RANGES, 'it touches these bytes: "0-1M", the end not included'),
    "region": PolicyKey(
        Form.TEXT,
        'it touches a part of the disk: "partition:1", "ext4:journal", "ext4:metadata", or with a '
        'partition "ext4:journal:1"; looked up in the image when the serving begins',
    ),
    "file": PolicyKey(
        Form.TEXT,
        "it touches the blocks that a file has in the image's ext4 when the serving begins: "
        '"/etc/passwd", or in a partition "1:/etc/passwd"',
    ),
    "block_share": PolicyKey(
        Form.SHARE, "it touches one of this share of the 4096-byte blocks, as drawn"
    ),
    "until_written": PolicyKey(Form.TRUTH, "a place that was written is healed; needs a place"),
    "connection": PolicyKey(Form.COUNT, "the client's number, counted from 1", least=1),
    "payload": PolicyKey(Form.CHOICE, "a write is all zero, or has data", choices=PayloadKind),
    "contains": PolicyKey(Form.TEXT, 'a write contains these bytes: a text, or "hex:c03b3998"'),
    "since": PolicyKey(
        Form.TEXT,
        'from an event on: "first-flush", "first-write", "mark:NAME" (nbdproxy ctl mark), '
        '"qmp:EVENT" (of QEMU\'s monitor)',
    ),
    "until": PolicyKey(Form.TEXT, "before such an event"),
    "after_s": PolicyKey(
        Form.SECONDS, "later than this after the serving began (by the clock)", least=0
    ),
    "before_s": PolicyKey(Form.SECONDS, "earlier than this (by the clock)", least=0),
    "nth": PolicyKey(Form.COUNT, "only the n-th", least=1),
    "every": PolicyKey(Form.COUNT, "every n-th", least=2),
    "after_count": PolicyKey(Form.COUNT, "behind the first n", least=1),
    "before_count": PolicyKey(Form.COUNT, "before the n-th", least=2),
    "after_bytes": PolicyKey(Form.SIZE, "when more than this came, it included", least=0),
    "before_bytes": PolicyKey(Form.SIZE, "when less than this came, it included", least=1),
    "probability": PolicyKey(Form.SHARE, "as often as this, as drawn with the seed"),
    "times": PolicyKey(Form.COUNT, "so many times at most", least=1),
    "once": PolicyKey(Form.TRUTH, "once at most"),
}
"""The keys that a rule's conditions may have."""

EVENT_FORMS = ("first-flush", "first-write", "mark:", "qmp:")
"""How the name of an event begins."""

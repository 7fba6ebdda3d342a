"""What a rule can do to a request: the values, and the table that drives loader and manual."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nbdproxy.policy.keys import Form, PolicyKey
from nbdproxy.requests import MODIFYING, Command, NbdErrno


class ActionKind(Enum):
    """What is done."""

    PASS = "pass"
    ERROR = "error"
    FSYNCGATE = "fsyncgate"
    DELAY = "delay"
    HANG = "hang"
    DISCONNECT = "disconnect"
    VIOLATE = "violate"
    LOSE = "lose"
    LIE = "lie"
    TEAR = "tear"
    MISDIRECT = "misdirect"
    CORRUPT = "corrupt"
    STALE = "stale"
    FLIP = "flip"
    STICK = "stick"
    CUT = "cut"


class Moment(Enum):
    """When a connection is dropped, seen from the reply."""

    BEFORE = "before"
    """The request is not done, and never answered."""
    MIDDLE = "middle"
    """It is done, and the reply ends at byte `at_byte`."""
    AFTER = "after"
    """It is done and answered."""


class Violation(Enum):
    """How a reply breaks the protocol."""

    MAGIC = "magic"
    """Its magic is wrong."""
    COOKIE = "cookie"
    """It answers a request that nobody sent."""
    TWICE = "twice"
    """It comes twice."""
    GARBAGE = "garbage"
    """Its bytes are random."""


class Keep(Enum):
    """Which sectors of a torn write are written."""

    FRONT = "front"
    BACK = "back"
    RANDOM = "random"


class Errno(Enum):
    """The errors that a rule may give."""

    EPERM = "EPERM"
    EIO = "EIO"
    ENOMEM = "ENOMEM"
    EINVAL = "EINVAL"
    ENOSPC = "ENOSPC"
    EOVERFLOW = "EOVERFLOW"
    ENOTSUP = "ENOTSUP"
    ESHUTDOWN = "ESHUTDOWN"

    @property
    def number(self) -> NbdErrno:
        """The number on the wire."""
        return NbdErrno[self.value]


@dataclass(frozen=True, slots=True)
class Action:
    """An action with its parameters; `ACTION_KEYS` says what each means and which action has it."""

    kind: ActionKind
    errno: Errno = Errno.EIO
    delay_s: float = 0
    jitter_s: float = 0
    moment: Moment = Moment.BEFORE
    at_byte: int = 8
    violation: Violation = Violation.MAGIC
    keep: Keep = Keep.RANDOM
    sectors: int | None = None
    shift: int = 4096
    bits: int = 1
    value: int = 1

    @property
    def drops_before(self) -> bool:
        """Whether the connection is dropped and the request is not done."""
        return self.kind is ActionKind.DISCONNECT and self.moment is Moment.BEFORE

    @property
    def undone(self) -> bool:
        """Whether the request is not done."""
        return self.kind in _UNDONE or self.drops_before


_UNDONE = frozenset({ActionKind.ERROR, ActionKind.FSYNCGATE, ActionKind.HANG})

ACTION_KEYS: dict[str, PolicyKey] = {
    "errno": PolicyKey(Form.CHOICE, "the error of the reply; default EIO", choices=Errno),
    "delay_s": PolicyKey(
        Form.SECONDS, "seconds before it is done and answered", least=0, most=86400
    ),
    "jitter_s": PolicyKey(
        Form.SECONDS, "up to so many seconds more, as drawn", least=0, most=86400
    ),
    "moment": PolicyKey(
        Form.CHOICE, "when the connection is dropped; default before", choices=Moment
    ),
    "at_byte": PolicyKey(Form.COUNT, "bytes of the reply that still leave; default 8", least=1),
    "violation": PolicyKey(Form.CHOICE, "what is wrong; default magic", choices=Violation),
    "keep": PolicyKey(Form.CHOICE, "which sectors are written; default random", choices=Keep),
    "sectors": PolicyKey(
        Form.COUNT, "how many sectors (512 bytes) are written; default drawn", least=0
    ),
    "shift": PolicyKey(Form.OFFSET, "bytes by which it misses; default 4096, a multiple of 512"),
    "bits": PolicyKey(Form.COUNT, "how many bits; default 1", least=1, most=4096),
    "value": PolicyKey(Form.COUNT, "what stuck bits read as, 0 or 1; default 1", least=0, most=1),
}
"""The keys that a rule's action may have."""

_ALL = frozenset(command for command in Command if command is not Command.DISC)
_WRITE, _READ, _FLUSH = frozenset({Command.WRITE}), frozenset({Command.READ}), {Command.FLUSH}


@dataclass(frozen=True, slots=True)
class ActionRule:
    """What there is to know of an action.

    commands   that it can strike
    keys       it has besides `delay_s` and `jitter_s`
    needs      keys that must be there
    cache      it makes no sense without `cache.holds`
    waits      `delay_s` may be added to it
    """

    help: str
    commands: frozenset[Command]
    keys: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    cache: bool = False
    waits: bool = True


ACTIONS: dict[ActionKind, ActionRule] = {
    ActionKind.PASS: ActionRule(
        "nothing: the request is done as if there were no rules behind this one", _ALL, waits=False
    ),
    ActionKind.ERROR: ActionRule("it is not done, and answered with an error", _ALL, ("errno",)),
    ActionKind.FSYNCGATE: ActionRule(
        "the flush fails, and what it had in hand is never written, though reads show it: a later "
        "flush succeeds without it",
        frozenset(_FLUSH),
        ("errno",),
        cache=True,
    ),
    ActionKind.DELAY: ActionRule("it is done later", _ALL, needs=("delay_s",)),
    ActionKind.HANG: ActionRule("it is not done, and never answered", _ALL, waits=False),
    ActionKind.DISCONNECT: ActionRule("the connection is dropped", _ALL, ("moment", "at_byte")),
    ActionKind.VIOLATE: ActionRule(
        "it is done, and its reply breaks the protocol", _ALL, ("violation",)
    ),
    ActionKind.LOSE: ActionRule(
        "it is answered, and reads go on showing what was there before", frozenset(MODIFYING)
    ),
    ActionKind.LIE: ActionRule(
        "a flush, or a request with FUA, is answered and makes nothing durable",
        frozenset(MODIFYING | _FLUSH),
        cache=True,
    ),
    ActionKind.TEAR: ActionRule(
        "only some of its sectors are written, and it is answered", _WRITE, ("keep", "sectors")
    ),
    ActionKind.MISDIRECT: ActionRule(
        "it is written to another place and not to its own", _WRITE, ("shift",)
    ),
    ActionKind.CORRUPT: ActionRule("it is written with flipped bits", _WRITE, ("bits",)),
    ActionKind.STALE: ActionRule(
        "it gets what was there before the last write of the place", _READ
    ),
    ActionKind.FLIP: ActionRule("it gets flipped bits, other ones each time", _READ, ("bits",)),
    ActionKind.STICK: ActionRule(
        "some bits of each of its sectors are stuck, always the same", _READ, ("bits", "value")
    ),
    ActionKind.CUT: ActionRule(
        "the power goes: the request was received, and is never answered", _ALL, waits=False
    ),
}

SHOWN_OTHERWISE = frozenset(
    {ActionKind.LOSE, ActionKind.TEAR, ActionKind.MISDIRECT, ActionKind.CORRUPT}
)
"""Actions after which reads show something else than what the image holds."""

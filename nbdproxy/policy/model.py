"""What a policy says, as frozen values; the file's form is in `nbdproxy.policy.schema`.

A policy is a disk with a volatile cache or without one, the events at which its power goes, and
layers of rules. What a rule decides for one request is `nbdproxy.policy.engine`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from nbdproxy.policy.actions import Action
from nbdproxy.policy.conditions import Conditions
from nbdproxy.requests import Command, CommandFlag


class CutEvent(Enum):
    """An event at which a policy cuts the power."""

    EXIT = "exit"
    """nbdproxy itself ends: a signal, or the end of the --run command."""
    DISCONNECT = "disconnect"
    """A client that opened the export says DISC or goes away."""
    DISC = "disc"
    """A client says DISC."""
    EOF = "eof"
    """A client goes away without DISC: it was killed, or its link broke."""
    SHUTDOWN = "shutdown"
    """QEMU reports SHUTDOWN on its QMP socket, which comes before its own last flushes."""
    RESET = "reset"
    """QEMU reports RESET: the guest was reset."""
    POWERDOWN = "powerdown"
    """QEMU reports POWERDOWN: the guest was asked to shut down."""


QMP_CUTS = {"SHUTDOWN": CutEvent.SHUTDOWN, "RESET": CutEvent.RESET, "POWERDOWN": CutEvent.POWERDOWN}
"""The events of QEMU's monitor at which a policy may cut."""


class FlushCovers(Enum):
    """What a flush makes durable."""

    COMPLETED = "completed"
    """Every write completed before the flush was received, as the NBD specification says."""
    NOTHING = "nothing"
    """Nothing, though it is answered: QEMU's cache=unsafe, or a disk that lies."""


class Survivors(Enum):
    """Which writes that no flush covers are on the image after a cut."""

    FLUSHED = "flushed"
    """None of them."""
    ALL = "all"
    """All of them."""
    PREFIX = "prefix"
    """The first ones, in the order received; how many is drawn."""
    RANDOM = "random"
    """Each or not, as it is drawn."""
    TORN = "torn"
    """Each sector of each or not, as it is drawn."""
    ALL_BUT_ONE = "all-but-one"
    """All but one, which is drawn."""
    METADATA = "metadata"
    """Those of an ext4's metadata (and journal), without the data: the adversary's choice."""
    DATA = "data"
    """Those of data, without the metadata."""


class WriteBackOrder(Enum):
    """Which of the held writes a cache that is over its window writes back first."""

    OLDEST = "oldest"
    NEWEST = "newest"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class VolatileCache:
    """A volatile write cache.

    holds   unflushed writes are held back from the image
    window  bytes it holds at most before it writes some back on its own; None for no limit
    order   which it writes back first then
    age_s   seconds after which it writes back what it holds; None for never
    """

    holds: bool = False
    window: int | None = None
    order: WriteBackOrder = WriteBackOrder.OLDEST
    age_s: float | None = None

    @property
    def writes_back(self) -> bool:
        """Whether held writes reach the image without a flush."""
        return self.window is not None or self.age_s is not None


@dataclass(frozen=True, slots=True)
class PowerCut:
    """When the power goes and what that leaves; `after_s` is seconds since the serving began."""

    at: frozenset[CutEvent] = frozenset()
    after_s: float | None = None
    survives: Survivors = Survivors.FLUSHED


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: when it strikes and what it does.

    name   what the recording calls it: the policy's name and its own
    where  file and key path, for messages
    """

    name: str
    where: str
    when: Conditions
    action: Action


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy, or several that were put together.

    names         of the policies it consists of
    summary       one line
    imitates      which real thing behaves like this
    sources       where that is said or was seen
    flush_covers  what a flush, or FUA, makes durable
    layers        the rules of each policy; within a layer the first that strikes decides
    settings      what --set said, for the recording
    """

    names: tuple[str, ...]
    summary: str = ""
    imitates: str = ""
    sources: tuple[str, ...] = ()
    cache: VolatileCache = VolatileCache()
    flush_covers: FlushCovers = FlushCovers.COMPLETED
    cut: PowerCut = PowerCut()
    layers: tuple[tuple[Rule, ...], ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How it is called in one word."""
        return "+".join(self.names)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of all layers."""
        return tuple(rule for layer in self.layers for rule in layer)

    @property
    def can_cut(self) -> bool:
        """Whether it may cut the power on its own."""
        return bool(self.cut.at) or self.cut.after_s is not None


class Handling(Enum):
    """What the export does with a request that no rule strikes."""

    PASS = auto()
    """Do it on the disk; whatever it promises is kept by the disk below."""
    HOLD = auto()
    """Keep it in the volatile cache; a cut takes it back."""
    HOLD_AND_LAND = auto()
    """Keep it in the cache, and answer when it alone has been written through (FUA)."""
    LAND = auto()
    """Write what this flush covers through the cache, then answer."""
    ANSWER = auto()
    """Answer, and do nothing."""


def handling(policy: Policy, command: int, flags: int) -> Handling:
    """Return what to do with a validated request that no rule strikes."""
    if command == Command.READ or not policy.cache.holds:
        return Handling.PASS
    honest = policy.flush_covers is FlushCovers.COMPLETED
    if command == Command.FLUSH:
        return Handling.LAND if honest else Handling.ANSWER
    if flags & CommandFlag.FUA and honest:
        return Handling.HOLD_AND_LAND
    return Handling.HOLD

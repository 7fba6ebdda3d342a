"""`StateId`: the printable name of a crash state, from which it is rebuilt on any machine.

    s1234.flushed.must                all that the failure is bound to leave, and nothing else
    s1234.flushed.all                 all that was sent
    s1234.flushed.but17,23:0-3        all, but request 17 and sectors 0 to 3 of request 23
    s1234.flushed.only17              nothing but what must, and request 17
    s1234.flushed.draw7-12            state number 12 of those that seed 7 draws
    s1234.flushed.must~100-103=17     with the value that request 17 left in the disk's sectors
                                      100 to 103; `base` is what was there before the recording,
                                      and `17_base` a torn sector, half of it one, half the other;
                                      `17x8_23x4_base` 8 bytes of 17, 4 of 23, and the rest base

The number is the cut's position, the word behind it the `Level` that is kept. Options of the model
follow, each after a `+` and only where it is not the default: `replied`, `fsyncgate`, `single` (no
CAN_MULTI_CONN), `sector4096`, `lost77` (a loss at position 77). Requests are named by their seq.

All but the last are legal by the model, unless `but` names what must be there; a value after `~`
may be anything that a request left there, legal or not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

from nbdproxy.errors import UsageError
from nbdproxy.persistence.model import DEFAULTS, Coverage, Level, Options
from nbdproxy.recording.index import BASE


class Choice(Enum):
    """Which of the undecided requests are on the disk: those that the level does not keep."""

    MUST = "must"
    """None: only what the level keeps."""
    ALL = "all"
    """All that were received and not answered with an error."""
    BUT = "but"
    """All but the state's parts."""
    ONLY = "only"
    """None but the state's parts."""
    DRAW = "draw"
    """Drawn at random: see `nbdproxy.crash.states.presence`."""


@dataclass(frozen=True, slots=True, order=True)
class RequestPart:
    """A request by its seq, or its sectors from `first` to `last`, counted from 0 in the request.

    Of a whole request `first` is None, and `last` -1.
    """

    seq: int
    first: int | None = None
    last: int = -1

    def __str__(self) -> str:
        if self.first is None:
            return str(self.seq)
        return f"{self.seq}:{_range(self.first, self.last)}"


@dataclass(frozen=True, slots=True, order=True)
class Pin:
    """The disk's sectors `first` to `last` hold what a request left there.

    `front` is the request's seq, or BASE; `back` is another one if the second half of each sector
    is of that one, a torn sector. `mix` is what each sector begins with, where requests end inside
    it: values and how many bytes of each; the rest is of `front`.
    """

    first: int
    last: int
    front: int
    back: int | None = None
    mix: tuple[tuple[int, int], ...] = ()

    def joined(self, behind: Pin) -> Pin | None:
        """Return both as one if they hold the same and nothing is between them."""
        both = replace(self, last=behind.last)
        is_one = self.last + 1 == behind.first and both == replace(behind, first=self.first)
        return both if is_one else None

    def __str__(self) -> str:
        value = "".join(f"{_value(one)}x{count}_" for one, count in self.mix) + _value(self.front)
        if self.back is not None:
            value += f"_{_value(self.back)}"
        return f"~{_range(self.first, self.last)}={value}"


@dataclass(frozen=True, slots=True)
class StateId:
    """The name of a crash state; see the module.

    `parts` belong to BUT and ONLY and ascend, `seed` and `number` to DRAW; `pins` are disjoint and
    ascend.
    """

    position: int
    level: Level
    choice: Choice
    options: Options = DEFAULTS
    parts: tuple[RequestPart, ...] = ()
    seed: int = 0
    number: int = 0
    pins: tuple[Pin, ...] = ()

    def __str__(self) -> str:
        what = self.choice.value + ",".join(map(str, self.parts))
        if self.choice is Choice.DRAW:
            what += f"{self.seed}-{self.number}"
        words = [f"s{self.position}.{self.level.value}.{what}{''.join(map(str, self.pins))}"]
        if self.options.coverage is not DEFAULTS.coverage:
            words.append(self.options.coverage.value)
        if self.options.fsyncgate:
            words.append("fsyncgate")
        if not self.options.multi_conn:
            words.append("single")
        if self.options.sector != DEFAULTS.sector:
            words.append(f"sector{self.options.sector}")
        words += [f"lost{position}" for position in self.options.losses]
        return "+".join(words)


_RANGE = r"\d+(?:-\d+)?"
_VALUE = r"(?:\d+|base)"
_STATE_ID = re.compile(
    rf"s(?P<position>\d+)\.(?P<level>[a-z]+)\.(?:(?P<choice>must|all)"
    rf"|(?P<list>but|only)(?P<parts>\d+(?::{_RANGE})?(?:,\d+(?::{_RANGE})?)*)"
    rf"|draw(?P<seed>\d+)-(?P<number>\d+))"
    rf"(?P<pins>(?:~{_RANGE}=(?:{_VALUE}x\d+_)*{_VALUE}(?:_{_VALUE})?)*)"
    r"(?P<replied>\+replied)?(?P<fsyncgate>\+fsyncgate)?(?P<single>\+single)?"
    r"(?:\+sector(?P<sector>\d+))?(?P<losses>(?:\+lost\d+)*)"
)
_DIGITS_MAX = 18
"""No number in an id is longer: all fit into 64 bits."""


def parse_state_id(text: str) -> StateId:
    """Read what `str(StateId)` wrote; raise UsageError for anything else."""
    match = _STATE_ID.fullmatch(text)
    try:
        if match is None or re.search(rf"\d{{{_DIGITS_MAX + 1}}}", text):
            raise ValueError(text)
        choice = match["choice"] or match["list"] or Choice.DRAW.value
        state = StateId(
            int(match["position"]),
            Level(match["level"]),
            Choice(choice),
            _options(match),
            _parts(match["parts"] or ""),
            int(match["seed"] or 0),
            int(match["number"] or 0),
            _pins(match["pins"]),
        )
        if str(state) != text:
            raise ValueError(text)
        return state
    except ValueError:
        raise UsageError(
            f"{text!r} is not the id of a crash state: paste one of `nbdproxy replay --json` or "
            f"`nbdproxy explore`, such as s1234.flushed.must"
        ) from None


def _options(match: re.Match[str]) -> Options:
    sector = int(match["sector"] or DEFAULTS.sector)
    if sector < 512 or sector & (sector - 1):
        raise ValueError(sector)
    return Options(
        coverage=Coverage.REPLIED if match["replied"] else Coverage.RECEIVED,
        sector=sector,
        multi_conn=not match["single"],
        fsyncgate=bool(match["fsyncgate"]),
        losses=tuple(int(word) for word in match["losses"].split("+lost")[1:]),
    )


def _parts(text: str) -> tuple[RequestPart, ...]:
    parts = []
    for word in filter(None, text.split(",")):
        seq, _, sectors = word.partition(":")
        parts.append(RequestPart(int(seq), *_bounds(sectors)) if sectors else RequestPart(int(seq)))
    if parts != sorted(set(parts), key=lambda part: (part.seq, part.last)):
        raise ValueError(text)
    return tuple(parts)


def _pins(text: str) -> tuple[Pin, ...]:
    pins = []
    for word in text.split("~")[1:]:
        sectors, _, value = word.partition("=")
        words = [word.partition("x") for word in value.split("_")]
        mix = tuple((_number(one), int(count)) for one, _, count in words if count)
        front, *back = [_number(one) for one, _, count in words if not count]
        if mix and (back or not all(count for _, count in mix)):
            raise ValueError(text)
        pins.append(Pin(*_bounds(sectors), front, back[0] if back else None, mix))
    if any(pin.first <= before.last for before, pin in pairwise(pins)):
        raise ValueError(text)
    return tuple(pins)


def _bounds(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    first, last = int(low), int(high or low)
    if last < first:
        raise ValueError(text)
    return first, last


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _value(seq: int) -> str:
    return "base" if seq == BASE else str(seq)


def _number(text: str) -> int:
    return BASE if text == "base" else int(text)

"""How rules decide, slowly and from the beginning: what the engine is measured against.

Written from the descriptions (docstrings and help texts of nbdproxy.policy), not from engine.py.
Every question is asked of the whole history: the requests and events up to a moment. Nothing is
kept between questions but answers that were given before, so that it ends within our lifetimes.
The bytes of a disk are looked at in units of `UNIT`; all places and requests must consist of such.

Not covered: doing what was decided, and finding places on a disk (`places` is given).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum
from typing import NamedTuple

from nbdproxy.dice import draw
from nbdproxy.extents import Extent
from nbdproxy.policy.actions import Action, ActionKind, Moment
from nbdproxy.policy.conditions import PayloadKind
from nbdproxy.policy.model import Rule
from nbdproxy.requests import Command, CommandFlag, Request

UNIT = 256
"""The grain of places and requests here."""

BLOCK = 4096
"""Of `block_share`."""


class Asked(NamedTuple):
    """A request as it came: from which client, and how long after the serving began."""

    connection: int
    request: Request
    now_s: float


History = Sequence["Asked | str"]
"""Requests, and events by name, in order."""


class Verdict(NamedTuple):
    """What becomes of a request; `number` is the rule's own count when it struck."""

    action: Action | None
    rule: str
    number: int
    delay_s: float


class Reference:
    """The rules of some layers, and a history."""

    def __init__(
        self,
        layers: Sequence[Sequence[Rule]],
        seed: int,
        places: Callable[[Rule], Sequence[Extent] | None],
        history: History,
    ) -> None:
        self.layers, self.seed, self.history = layers, seed, history
        self._places = {
            rule.name: None if (found := places(rule)) is None else units_of(found)
            for layer in layers
            for rule in layer
        }
        self._counted: dict[tuple[str, int], bool] = {}
        self._struck: dict[tuple[str, int], bool] = {}
        self._verdicts: dict[int, Verdict | None] = {}

    def verdict(self, at: int) -> Verdict | None:
        """What becomes of the request at this place of the history; None if no rule strikes."""
        if at not in self._verdicts:
            self._verdicts[at] = self._verdict(at)
        return self._verdicts[at]

    def _verdict(self, at: int) -> Verdict | None:
        """Delays of the layers add up; the first other action decides, and is the last."""
        striking = [
            rule
            for layer in range(len(self.layers))
            if self._reaches(layer, at)
            for rule in self._striking(layer, at)
            if rule.action.kind is not ActionKind.PASS
        ]
        if not striking:
            return None
        last = striking[-1]
        return Verdict(
            None if last.action.kind is ActionKind.DELAY else last.action,
            last.name,
            self.number(last, at),
            fsum(rule.action.delay_s + self._jitter_s(rule, at) for rule in striking),
        )

    def _jitter_s(self, rule: Rule, at: int) -> float:
        return rule.action.jitter_s * draw(self.seed, rule.name, self.number(rule, at), "jitter")

    def strikes(self, rule: Rule, at: int) -> bool:
        """Whether it is this rule's turn at a request that it counts."""
        key = (rule.name, at)
        if key not in self._struck:
            self._struck[key] = self.counts(rule, at) and self._has_turn(rule, at)
        return self._struck[key]

    def counts(self, rule: Rule, at: int) -> bool:
        """Whether the rule sees a request, it fits, and it is in time."""
        key = (rule.name, at)
        if key not in self._counted:
            self._counted[key] = (
                self._sees(rule, at) and self._fits(rule, at) and self._in_time(rule, at)
            )
        return self._counted[key]

    def number(self, rule: Rule, at: int) -> int:
        """How many requests the rule has counted, the one at this place included."""
        return sum(self.counts(rule, before) for before in self._requests(at + 1))

    @property
    def requests(self) -> list[int]:
        """Where in the history the requests are."""
        return self._requests(len(self.history))

    def _requests(self, end: int) -> list[int]:
        return [at for at in range(end) if not isinstance(self.history[at], str)]

    def _asked(self, at: int) -> Asked:
        asked = self.history[at]
        assert not isinstance(asked, str)
        return asked

    def _striking(self, layer: int, at: int) -> list[Rule]:
        """The rule of a layer that strikes, if any: never more than one does."""
        return [rule for rule in self.layers[layer] if self.strikes(rule, at)]

    def _reaches(self, layer: int, at: int) -> bool:
        """No earlier layer has decided: all that struck there were delays or passes."""
        mild = {ActionKind.DELAY, ActionKind.PASS}
        return all(
            rule.action.kind in mild
            for earlier in range(layer)
            for rule in self._striking(earlier, at)
        )

    def _sees(self, rule: Rule, at: int) -> bool:
        """Whether a request gets as far as this rule."""
        (layer,) = [n for n, rules in enumerate(self.layers) if rule in rules]
        before = self.layers[layer][: list(self.layers[layer]).index(rule)]
        return self._reaches(layer, at) and not any(self.strikes(one, at) for one in before)

    def _fits(self, rule: Rule, at: int) -> bool:
        when, asked = rule.when, self._asked(at)
        request = asked.request
        fua = bool(request.flags & CommandFlag.FUA)
        payload = bytes(request.payload)
        kind = PayloadKind.DATA if any(payload) else PayloadKind.ZERO
        return all(
            (
                request.command in when.commands,
                all(request.flags & flag for flag in CommandFlag if when.flags & flag),
                not any(request.flags & flag for flag in CommandFlag if when.without_flags & flag),
                when.connection in {None, asked.connection},
                when.payload in {None, kind},
                when.contains is None or when.contains in payload,
                rule.action.kind is not ActionKind.LIE or fua or request.command == Command.FLUSH,
                not when.has_place or self._touches(rule, at),
            )
        )

    def _touches(self, rule: Rule, at: int) -> bool:
        """Whether a request touches a place of the rule that no earlier one has healed."""
        places, when = self._places[rule.name], rule.when
        touched = units(self._asked(at).request)
        if places is not None:
            touched &= places
        if when.until_written:
            touched -= self._written(at)
        if when.block_share is None:
            return bool(touched)
        blocks = {unit * UNIT // BLOCK for unit in touched}
        return any(
            draw(self.seed, rule.name, "block", block) < when.block_share for block in blocks
        )

    def _written(self, at: int) -> set[int]:
        """What was written before: requests that change the disk, and were done."""
        changing = {Command.WRITE, Command.WRITE_ZEROES, Command.TRIM}
        found: set[int] = set()
        for before in self._requests(at):
            verdict = self.verdict(before)
            action = verdict.action if verdict else None
            not_done = action is not None and (
                action.kind in {ActionKind.ERROR, ActionKind.FSYNCGATE, ActionKind.HANG}
                or (action.kind is ActionKind.DISCONNECT and action.moment is Moment.BEFORE)
            )
            if self._asked(before).request.command in changing and not not_done:
                found |= units(self._asked(before).request)
        return found

    def _in_time(self, rule: Rule, at: int) -> bool:
        when, now_s = rule.when, self._asked(at).now_s
        events = {event for event in self.history[:at] if isinstance(event, str)}
        commands = {self._asked(before).request.command for before in self._requests(at)}
        events |= {"first-flush"} if Command.FLUSH in commands else set()
        events |= {"first-write"} if Command.WRITE in commands else set()
        return all(
            (
                when.since is None or when.since in events,
                when.until is None or when.until not in events,
                when.after_s is None or now_s > when.after_s,
                when.before_s is None or now_s < when.before_s,
            )
        )

    def _has_turn(self, rule: Rule, at: int) -> bool:
        when, number = rule.when, self.number(rule, at)
        came = sum(
            self._asked(one).request.length
            for one in self._requests(at + 1)
            if self.counts(rule, one)
        )
        times = sum(self.strikes(rule, before) for before in self._requests(at))
        turn = draw(self.seed, rule.name, number, "turn")
        return all(
            (
                when.nth in {None, number},
                when.every is None or number % when.every == 0,
                when.after_count is None or number > when.after_count,
                when.before_count is None or number < when.before_count,
                when.after_bytes is None or came > when.after_bytes,
                when.before_bytes is None or came < when.before_bytes,
                when.times is None or times < when.times,
                when.probability is None or turn < when.probability,
            )
        )


def units(request: Request) -> set[int]:
    """The units that a request touches."""
    return units_of([Extent(request.offset, request.length)])


def units_of(extents: Sequence[Extent]) -> set[int]:
    """The units of some extents."""
    found: set[int] = set()
    for extent in extents:
        assert extent.offset % UNIT == extent.length % UNIT == 0
        found |= set(range(extent.offset // UNIT, extent.end // UNIT))
    return found

"""Decides, request by request, whether a rule strikes: the state that rules need, and nothing else.

Guarantees: the same requests in the same order, the same events in between, and the same seed
give the same decisions; only rules with `after_s` or `before_s` look at the clock. Within a layer
(one policy) the first rule that strikes decides, and a rule sees only what no earlier rule of its
layer took. With several layers delays add up, and the first other action decides; later layers do
not see that request. (A write that a later layer fails heals no place of an earlier one.)

Not covered: doing it, which is the server's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nbdproxy.dice import DrawKey, draw
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.policy.actions import Action, ActionKind
from nbdproxy.policy.conditions import PayloadKind
from nbdproxy.policy.model import Policy, Rule
from nbdproxy.requests import MODIFYING, Command, CommandFlag, Request

BLOCK = 4096
"""The grain of `block_share`."""

PlacesOf = Callable[[Rule], Sequence[Extent] | None]
"""Tells where a rule strikes; None for everywhere. Raises PolicyError if there is no such place."""

_FUA = int(CommandFlag.FUA)
_FLUSH, _WRITE = int(Command.FLUSH), int(Command.WRITE)


class Decision(NamedTuple):
    """What becomes of a request.

    action    None if it is only delayed
    draw_key  of the rule whose action it is, or of the last that delays
    delay_s   seconds to wait before
    """

    action: Action | None
    draw_key: DrawKey
    delay_s: float = 0

    @property
    def kind(self) -> ActionKind:
        """What is done."""
        return self.action.kind if self.action is not None else ActionKind.DELAY


class Engine:
    """The rules of a policy at work. `places` is asked once for each rule."""

    def __init__(self, policy: Policy, seed: int, places: PlacesOf) -> None:
        self.seed = seed
        self.matched: dict[str, int] = {rule.name: 0 for rule in policy.rules}
        """How often each rule matched."""
        self._layers = [
            [_Counter(rule, seed, places(rule)) for rule in layer] for layer in policy.layers
        ]
        self._healing = [c for layer in self._layers for c in layer if c.rule.when.until_written]
        self._events: set[str] = set()
        # For each command only the rules that can strike it, in layers that have any.
        self._of_command: dict[int, list[list[_Counter]]] = {}
        for command in Command:
            layers = [[c for c in one if command in c.rule.when.commands] for one in self._layers]
            self._of_command[int(command)] = [layer for layer in layers if layer]
        watched = {e for r in policy.rules for e in (r.when.since, r.when.until) if e is not None}
        self._watches_writes = "first-write" in watched
        self.watches_qmp = any(event.startswith("qmp:") for event in watched)
        """Whether a decision may hang on an event of QEMU's monitor."""

    def happened(self, event: str) -> None:
        """Take note of an event: "mark:NAME" or "qmp:EVENT"."""
        self._events.add(event)

    def decide(self, connection: int, request: Request, now_s: float) -> Decision | None:
        """Return what becomes of the next request; None if it is done as ever.

        `now_s` is seconds since the serving began.
        """
        delay_s, last, decided = 0.0, None, None
        for layer in self._of_command[request.command]:
            for counter in layer:
                if not counter.matches(connection, request, now_s, self._events):
                    continue
                action = counter.rule.action
                if action.kind is ActionKind.PASS:
                    break
                self.matched[counter.rule.name] += 1
                delay_s += action.delay_s
                if action.jitter_s:
                    delay_s += action.jitter_s * counter.draw_key.draw("jitter")
                last = counter
                if action.kind is not ActionKind.DELAY:
                    decided = counter
                break
            if decided is not None:
                break
        self._note(request, decided)
        if decided is not None:
            return Decision(decided.rule.action, decided.draw_key, delay_s)
        return Decision(None, last.draw_key, delay_s) if last is not None else None

    def _note(self, request: Request, decided: _Counter | None) -> None:
        """Remember what later decisions depend on."""
        command = request.command
        if command == _FLUSH:
            self._events.add("first-flush")
        elif self._watches_writes and command == _WRITE:
            self._events.add("first-write")
        if self._healing and command in MODIFYING:
            if decided is not None and decided.rule.action.undone:
                return
            for counter in self._healing:
                counter.healed.add(request.offset, request.end)


class _Counter:
    """A rule and what it has seen: requests and bytes that fitted, and how often it matched."""

    def __init__(self, rule: Rule, seed: int, places: Sequence[Extent] | None) -> None:
        self.rule = rule
        self.count = 0
        self.healed = ExtentSet()
        self._seed = seed
        self._bytes = 0
        self._matched = 0
        self._places = ExtentSet(places) if places is not None else None
        self._lie = rule.action.kind is ActionKind.LIE

    def matches(self, connection: int, request: Request, now_s: float, events: set[str]) -> bool:
        """Count a request that fits in time, and tell whether it is its turn."""
        if not self._fits(connection, request) or not self._in_time(now_s, events):
            return False
        self.count += 1
        self._bytes += request.length
        if not self._its_turn():
            return False
        self._matched += 1
        return True

    @property
    def draw_key(self) -> DrawKey:
        """What makes the draws for the request that was counted last."""
        return DrawKey(self._seed, self.rule.name, self.count)

    def _fits(self, connection: int, request: Request) -> bool:
        when, flags = self.rule.when, request.flags
        if flags & when.flags != when.flags or flags & when.without_flags:
            return False
        if self._lie and request.command != _FLUSH and not flags & _FUA:
            return False
        if when.connection is not None and when.connection != connection:
            return False
        if when.payload is not None:
            zero = _is_zero(request.payload)
            if zero is not (when.payload is PayloadKind.ZERO):
                return False
        if when.contains is not None and when.contains not in bytes(request.payload):
            return False
        return not when.has_place or self._in_place(request)

    def _in_place(self, request: Request) -> bool:
        """Tell whether a request touches a place of the rule that is not healed."""
        start, end = request.offset, request.end
        if self._places is None:
            found = [Extent.between(start, end)]
        else:
            found = list(self._places.overlapping(start, end))
        if self.rule.when.until_written:
            found = [m for extent in found for m in self.healed.missing(extent.offset, extent.end)]
        share = self.rule.when.block_share
        if share is None:
            return any(extent.length for extent in found)
        return any(
            draw(self._seed, self.rule.name, "block", block) < share
            for extent in found
            if extent.length
            for block in range(extent.offset // BLOCK, -(-extent.end // BLOCK))
        )

    def _in_time(self, now_s: float, events: set[str]) -> bool:
        when = self.rule.when
        return not (
            (when.since is not None and when.since not in events)
            or (when.until is not None and when.until in events)
            or (when.after_s is not None and now_s <= when.after_s)
            or (when.before_s is not None and now_s >= when.before_s)
        )

    def _its_turn(self) -> bool:
        when, count = self.rule.when, self.count
        return not (
            (when.nth is not None and count != when.nth)
            or (when.every is not None and count % when.every)
            or (when.after_count is not None and count <= when.after_count)
            or (when.before_count is not None and count >= when.before_count)
            or (when.after_bytes is not None and self._bytes <= when.after_bytes)
            or (when.before_bytes is not None and self._bytes >= when.before_bytes)
            or (when.times is not None and self._matched >= when.times)
            or (when.probability is not None and self.draw_key.draw("turn") >= when.probability)
        )


def _is_zero(payload: memoryview) -> bool:
    return not len(payload) or (payload[0] == 0 and bytes(payload).count(0) == len(payload))

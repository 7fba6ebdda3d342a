"""Says in words what a policy does: for `nbdproxy policy show` and the gallery's page."""

from __future__ import annotations

from collections.abc import Iterator

from nbdproxy.policy.actions import ACTIONS, Action, ActionKind, Moment
from nbdproxy.policy.conditions import Conditions
from nbdproxy.policy.model import (
    CutEvent,
    FlushCovers,
    Policy,
    Rule,
    Survivors,
    VolatileCache,
    WriteBackOrder,
)
from nbdproxy.requests import Command, CommandFlag
from nbdproxy.sizes import exact_size

_EVENTS = {
    CutEvent.EXIT: "when nbdproxy ends",
    CutEvent.DISCONNECT: "when a client leaves, saying DISC or not",
    CutEvent.DISC: "when a client says DISC",
    CutEvent.EOF: "when a client goes away without DISC",
    CutEvent.SHUTDOWN: "at QEMU's SHUTDOWN event (with --qmp)",
    CutEvent.RESET: "at QEMU's RESET event (with --qmp)",
    CutEvent.POWERDOWN: "at QEMU's POWERDOWN event (with --qmp)",
}
_SURVIVORS = {
    Survivors.FLUSHED: "only what was flushed is on the image then",
    Survivors.ALL: "all that was written is on the image then",
    Survivors.PREFIX: "of what was not flushed the first writes are on the image then, as drawn",
    Survivors.RANDOM: "of what was not flushed each write is on the image then or not, as drawn",
    Survivors.TORN: "of what was not flushed each sector is on the image then or not, as drawn",
    Survivors.ALL_BUT_ONE: "of what was not flushed all but one write, as drawn, is on the image",
    Survivors.METADATA: "of what was not flushed only the metadata of ext4 is on the image then",
    Survivors.DATA: "of what was not flushed only what is not metadata of ext4 is on the image",
}


def sentences(policy: Policy) -> Iterator[str]:
    """Yield what a policy does, a line each: the cache, flushes, the cut, the rules."""
    yield from _cache(policy.cache)
    if policy.cache.holds:
        honest = policy.flush_covers is FlushCovers.COMPLETED
        yield (
            "A flush makes durable what was completed before it was received, FUA its own request."
            if honest
            else "Flushes and FUA are answered, and make nothing durable."
        )
    if policy.can_cut:
        when = [_EVENTS[event] for event in CutEvent if event in policy.cut.at]
        if policy.cut.after_s is not None:
            when.append(f"{policy.cut.after_s:g} s after the serving began")
        yield f"The power goes {', or '.join(when)}; {_SURVIVORS[policy.cut.survives]}."
    for rule in policy.rules:
        yield rule_in_words(rule)
    if not policy.cache.holds and not policy.can_cut and not policy.rules:
        yield "Every request is done on the image at once."


def _cache(cache: VolatileCache) -> Iterator[str]:
    if not cache.holds:
        return
    text = "Writes are held in a volatile cache"
    if cache.window is not None:
        order = f"the {cache.order.value} first"
        if cache.order is WriteBackOrder.RANDOM:
            order = "in an order that is drawn"
        text += f"; what is over {exact_size(cache.window)} is written back, {order}"
    if cache.age_s is not None:
        text += f"; what is older than {cache.age_s:g} s is written back"
    yield text + "."


def rule_in_words(rule: Rule) -> str:
    """Return what a rule says, as a sentence."""
    return f"{rule.name}: {_which(rule.when, rule.action.kind)}: {_what(rule.action)}."


def _what(action: Action) -> str:
    text = {
        ActionKind.ERROR: f"is not done, and answered with {action.errno.value}",
        ActionKind.FSYNCGATE: (
            f"fails with {action.errno.value}, and what it had in hand is never written"
        ),
        ActionKind.DELAY: "is done later",
        ActionKind.DISCONNECT: _drop(action),
        ActionKind.VIOLATE: f"is done, and its reply is wrong ({action.violation.value})",
        ActionKind.TEAR: "is written in part, by whole sectors",
        ActionKind.MISDIRECT: f"lands {action.shift:+d} bytes from its place",
        ActionKind.CORRUPT: f"is written with flipped bits ({action.bits})",
        ActionKind.FLIP: f"gets flipped bits ({action.bits})",
        ActionKind.STICK: f"gets stuck bits in each sector ({action.bits}, at {action.value})",
    }.get(action.kind, ACTIONS[action.kind].help.removeprefix("it "))
    if action.delay_s or action.jitter_s:
        most = f" to {action.delay_s + action.jitter_s:g}" if action.jitter_s else ""
        text += f", after {action.delay_s:g}{most} s"
    return text


def _drop(action: Action) -> str:
    if action.moment is Moment.BEFORE:
        return "is not done, and the connection is dropped"
    if action.moment is Moment.AFTER:
        return "is done and answered, and the connection is dropped then"
    return f"is done, and the connection is dropped {action.at_byte} bytes into the reply"


def _which(when: Conditions, kind: ActionKind) -> str:
    commands = "request"
    if when.commands != ACTIONS[kind].commands or len(when.commands) == 1:
        words = [one.name.lower().replace("_", "-") for one in Command if one in when.commands]
        commands = " or ".join(words)
    parts = [f"{_turn(when)} {commands}"]
    parts += [
        text
        for told, text in (
            (when.flags, f"with {_flags(when.flags)}"),
            (when.without_flags, f"without {_flags(when.without_flags)}"),
            (when.ranges, f"in {_ranges(when)}"),
            (when.region, f"in {when.region}"),
            (when.file, f"in the file {when.file}"),
            (when.block_share, f"in {when.block_share or 0:.3g} of the blocks, as drawn"),
            (when.until_written, "until it is written"),
            (when.connection, f"of client {when.connection}"),
            (when.payload, f"of {when.payload.value if when.payload else ''}"),
            (when.contains, f"that contains {when.contains!r}"),
            (when.since, f"after {when.since}"),
            (when.until, f"before {when.until}"),
            (when.after_s is not None, f"later than {when.after_s} s"),
            (when.before_s is not None, f"earlier than {when.before_s} s"),
            (when.after_count, f"behind the first {when.after_count}"),
            (when.before_count, f"before number {when.before_count}"),
            (when.after_bytes is not None, f"behind the first {exact_size(when.after_bytes or 0)}"),
            (when.before_bytes, f"within the first {exact_size(when.before_bytes or 0)}"),
            (when.probability, f"with probability {when.probability or 0:g}"),
            (when.times, f"at most {when.times} times" if when.times != 1 else "once"),
        )
        if told
    ]
    return " ".join(parts)


def _turn(when: Conditions) -> str:
    if when.nth is not None:
        return f"the {when.nth}{_ordinal(when.nth)}"
    if when.every is not None:
        return f"every {when.every}{_ordinal(when.every)}"
    return "each"


def _ordinal(number: int) -> str:
    if number % 100 in {11, 12, 13}:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _flags(flags: int) -> str:
    return " and ".join((flag.name or "").replace("_", "-") for flag in CommandFlag(flags))


def _ranges(when: Conditions) -> str:
    return ", ".join(f"{exact_size(low)}-{exact_size(high)}" for low, high in when.ranges or ())

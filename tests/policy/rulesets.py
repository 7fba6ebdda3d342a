"""Random rule sets, as the tables of a policy file, and random requests and events.

What is drawn fits together often enough that most rules are accepted and strike, and is wrong often
enough that each refusal comes up. `dice` may be Hypothesis's, which shrinks, or Python's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from nbdproxy.errors import PolicyError
from nbdproxy.extents import Extent
from nbdproxy.nbd.tables import COMMAND_RULES
from nbdproxy.policy.actions import ACTIONS, ActionKind
from nbdproxy.policy.build import build
from nbdproxy.policy.keys import checked
from nbdproxy.policy.model import Policy, Rule
from nbdproxy.policy.schema import KEYS
from nbdproxy.requests import Command, CommandFlag, Request
from tests.policy.reference import UNIT, Asked, History

Table = dict[str, Any]
Maker = Callable[[random.Random], object]

DISK = 64 * UNIT
EVENTS = ["first-flush", "first-write", "mark:a", "mark:b", "qmp:SHUTDOWN"]
REGIONS = {"partition:1": [Extent(0, 4096)], "ext4:journal": [Extent(512, 512), Extent(8192, 256)]}
TEXTS = ["abc", "A", "hex:00", "hex:0041", "hex:zz", ""]


def _one_of(*values: object) -> Maker:
    return lambda dice: dice.choice(values)


def _range(dice: random.Random) -> str:
    low = dice.randrange(0, 60)
    return f"{low * UNIT}-{(low + dice.choice((1, 2, 8, 30))) * UNIT}"


CONDITIONS: dict[str, Maker] = {
    "flags": _one_of("fua", "fua", "fua", ["df"], ["no-hole", "fua"], "req-one"),
    "without_flags": _one_of("fua", "fua", "no-hole", ["df", "fast-zero"]),
    "range": lambda dice: [_range(dice), _range(dice)] if dice.random() < 0.4 else _range(dice),
    "region": _one_of(*REGIONS),
    "file": _one_of("/etc/passwd"),
    "block_share": _one_of(0.3, 0.6, 1),
    "until_written": _one_of(True, True, False),
    "connection": _one_of(1, 2),
    "payload": _one_of("zero", "data"),
    "contains": _one_of(*TEXTS),
    "since": _one_of(*EVENTS, "first-read"),
    "until": _one_of(*EVENTS, "mark:"),
    "after_s": _one_of(0, 1, 1.5, -1),
    "before_s": _one_of(0, 1, 2.5, 4),
    "nth": _one_of(1, 2, 3, 4),
    "every": _one_of(2, 3),
    "after_count": _one_of(1, 2, 3),
    "before_count": _one_of(2, 3, 4, 6),
    "after_bytes": _one_of(0, 512, "1K", 4096),
    "before_bytes": _one_of(513, "1K", 4096, "8K"),
    "probability": _one_of(0.2, 0.5, 0.9, 1),
    "times": _one_of(1, 2, 3),
    "once": _one_of(True, False),
}
"""A maker of values for each condition but `command`; a few are wrong."""

ACTION_VALUES: dict[str, Maker] = {
    "errno": _one_of("EIO", "ENOSPC", "EPERM"),
    "delay_s": _one_of(0, 0.25, 1, 2),
    "jitter_s": _one_of(0, 0.5, 1),
    "moment": _one_of("before", "middle", "after"),
    "at_byte": _one_of(1, 8),
    "violation": _one_of("magic", "cookie", "twice", "garbage"),
    "keep": _one_of("front", "back", "random"),
    "sectors": _one_of(0, 1, 2),
    "shift": _one_of(512, -4096, "1M", 7),
    "bits": _one_of(1, 3),
    "value": _one_of(0, 1),
}
"""A maker of values for each key of an action."""


def rule_table(dice: random.Random) -> Table:
    """Draw one rule, as a file has it."""
    kind = dice.choice(list(ActionKind))
    kind = dice.choice((ActionKind.PASS, ActionKind.DELAY, ActionKind.ERROR, kind, kind, kind))
    known = ACTIONS[kind]
    table: Table = {"action": kind.value}
    waits = ("delay_s", "jitter_s") if known.waits else ()
    for key in {*known.keys, *waits} if dice.random() < 0.5 else set():
        if dice.random() < 0.5:
            table[key] = ACTION_VALUES[key](dice)
    table.update({key: ACTION_VALUES[key](dice) for key in known.needs})
    if dice.random() < 0.5:
        own = [command.name.lower().replace("_", "-") for command in sorted(known.commands)]
        table["command"] = dice.sample(own, dice.randint(1, min(3, len(own))))
    for key in dice.sample(list(CONDITIONS), dice.choice((0, 1, 2, 2, 3, 4))):
        table[key] = CONDITIONS[key](dice)
    placed = {"range", "region", "file", "block_share"} & set(table)
    if "until_written" in table and not placed and dice.random() < 0.9:
        table["block_share" if dice.random() < 0.5 else "range"] = CONDITIONS["range"](dice)
        if "block_share" in table:
            table["block_share"] = CONDITIONS["block_share"](dice)
    elif placed and dice.random() < 0.4:
        table["until_written"] = True
    if dice.random() < 0.02:
        table["name"] = "taken"
    return table


def build_tables(tables: Table, name: str = "mine") -> Policy:
    """Build the policy of a file with these tables, through the real path."""
    top = {"summary": "s", "imitates": "i"} | tables
    return build("f.toml", name, checked("f.toml", "", top, KEYS))


def built(rules: list[Table], name: str) -> tuple[Rule, ...]:
    """Build the rules of one policy; raises PolicyError."""
    return build_tables({"cache": {"holds": True}, "rule": rules}, name).rules


def layer(dice: random.Random, name: str) -> tuple[Rule, ...]:
    """Draw the rules of one policy; those that are refused are dropped, one by one."""
    tables: list[Table] = []
    found: tuple[Rule, ...] = ()
    for _ in range(dice.choice((1, 2, 3, 4))):
        try:
            found = built([*tables, rule := rule_table(dice)], name)
        except PolicyError as refused:
            message = str(refused)
            assert message.startswith("f.toml: rule["), message
            assert "\n" not in message
        else:
            tables.append(rule)
    return found


def layers(dice: random.Random) -> tuple[tuple[Rule, ...], ...]:
    """Draw the rules of one policy, or of several."""
    count = dice.choice((1, 1, 2, 3))
    return tuple(found for n in range(count) if (found := layer(dice, f"p{n}")))


def request(dice: random.Random) -> Request:
    """Draw a legal request."""
    command = dice.choice((*([Command.WRITE] * 3), *([Command.READ] * 2), *COMMAND_RULES))
    legal = [flag for flag in CommandFlag if flag & COMMAND_RULES[command].flags]
    flags = dice.choice((0, 0, int(CommandFlag.FUA)))
    for flag in legal:
        flags |= int(flag) if dice.random() < 0.4 else 0
    if command == Command.FLUSH:
        return Request(command, flags, 7, 0, 0, memoryview(b""))
    length = dice.choice((1, 2, 2, 4, 20)) * UNIT
    offset = dice.randrange(0, DISK - length + UNIT, UNIT)
    payload = b""
    if command == Command.WRITE:
        start = dice.choice((b"", b"", b"abc", b"A"))
        payload = (bytes(5) + start).ljust(length, b"\0")
    return Request(command, flags, 7, offset, length, memoryview(payload))


def history(dice: random.Random) -> History:
    """Draw requests of several clients, with events in between."""
    found: list[Asked | str] = []
    now_s = 0.0
    for _ in range(dice.randint(4, 14)):
        now_s += dice.choice((0, 0, 0.5, 1))
        if dice.random() < 0.15:
            found.append(dice.choice(EVENTS[2:]))
        found.append(Asked(dice.choice((1, 1, 2, 3)), request(dice), now_s))
    return found


def places(rule: Rule) -> list[Extent] | None:
    """Where a rule strikes on the disk of these tests."""
    if rule.when.region is not None:
        return REGIONS[rule.when.region]
    if rule.when.file is not None:
        return [Extent(4096, 1024), Extent(0, 256)]
    if rule.when.ranges is not None:
        return [Extent.between(low, high) for low, high in rule.when.ranges]
    return None

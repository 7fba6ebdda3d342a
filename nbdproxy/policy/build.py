"""Makes a `Policy` of a file's tables, and refuses what makes no sense.

Refused are keys that do not belong to an action, conditions that contradict each other, and rules
that can never strike, each with file and key path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from nbdproxy.errors import PolicyError
from nbdproxy.nbd.tables import COMMAND_RULES
from nbdproxy.policy.actions import ACTION_KEYS, ACTIONS, Action, ActionKind
from nbdproxy.policy.conditions import EVENT_FORMS, Conditions
from nbdproxy.policy.keys import checked
from nbdproxy.policy.model import (
    FlushCovers,
    Policy,
    PowerCut,
    Rule,
    Survivors,
    VolatileCache,
    WriteBackOrder,
)
from nbdproxy.policy.schema import CACHE_KEYS, CUT_KEYS, FLUSH_KEYS, RULE_KEYS
from nbdproxy.policy.sense import check_rule, check_shadows
from nbdproxy.requests import Command, CommandFlag

_SECTOR = 512


def build(file: str, name: str, top: Mapping[str, Any]) -> Policy:
    """Return the policy that the tables of `file` describe; parameters have been put in."""
    cache = checked(file, "cache.", top.get("cache", {}), CACHE_KEYS)
    flush = checked(file, "flush.", top.get("flush", {}), FLUSH_KEYS)
    cut = checked(file, "cut.", top.get("cut", {}), CUT_KEYS)
    policy = Policy(
        names=(name,),
        summary=top["summary"],
        imitates=top["imitates"],
        sources=top.get("sources", ()),
        cache=VolatileCache(
            cache.get("holds", False),
            cache.get("window"),
            cache.get("order", WriteBackOrder.OLDEST),
            cache.get("age_s"),
        ),
        flush_covers=flush.get("covers", FlushCovers.COMPLETED),
        cut=PowerCut(
            cut.get("at", frozenset()), cut.get("after_s"), cut.get("survives", Survivors.FLUSHED)
        ),
    )
    _check_cache(file, policy, cache, cut)
    rules = tuple(_rules(file, policy, top.get("rule", [])))
    check_shadows(rules)
    return replace(policy, layers=(rules,) if rules else ())


def _check_cache(
    file: str,
    policy: Policy,
    cache: Mapping[str, object],
    cut: Mapping[str, object],
) -> None:
    if not policy.cache.holds:
        without = "has no effect unless cache.holds is true; set it, or drop this key"
        for key in ("window", "order", "age_s"):
            if key in cache:
                raise PolicyError(f"{file}: cache.{key}: {without}")
        if policy.flush_covers is FlushCovers.NOTHING:
            raise PolicyError(f"{file}: flush.covers: a flush that covers nothing {without}")
        if "survives" in cut:
            raise PolicyError(f"{file}: cut.survives: {without}")
    if "order" in cache and policy.cache.window is None:
        raise PolicyError(
            f"{file}: cache.order: has no effect without cache.window; set that, or drop this key"
        )


def _rules(file: str, policy: Policy, tables: list[dict[str, Any]]) -> Iterator[Rule]:
    taken: set[str] = set()
    for index, table in enumerate(tables):
        where = f"rule[{index}]"
        values = checked(file, f"{where}.", table, RULE_KEYS)
        if not values.pop("enabled", True):
            continue
        own = values.pop("name", f"rule {index + 1}")
        if own in taken:
            raise PolicyError(f"{file}: {where}.name: {own!r} is taken; choose another")
        taken.add(own)
        rule = _rule(f"{file}: {where}", f"{policy.name}/{own}", values)
        if ACTIONS[rule.action.kind].cache and not policy.cache.holds:
            raise PolicyError(
                f"{rule.where}.action: {rule.action.kind.value} needs cache.holds = true: without "
                "a volatile cache there is nothing that a flush could fail to save"
            )
        yield rule


def _rule(where: str, name: str, values: dict[str, Any]) -> Rule:
    kind: ActionKind = values.pop("action")
    action = _action(where, kind, values)
    commands = _commands(where, kind, values)
    if values.pop("once", False):
        for key, problem in (
            ("times", "contradicts times; drop one of them"),
            ("nth", "there is only one n-th; drop once"),
        ):
            if key in values:
                raise PolicyError(f"{where}.once: {problem}")
        values["times"] = 1
    for key in ("flags", "without_flags"):
        if key in values:
            values[key] = sum(word.flag for word in values[key])
    if "range" in values:
        values["ranges"] = values.pop("range")
    if "contains" in values:
        values["contains"] = _bytes(f"{where}.contains", values["contains"])
    for key in ("since", "until"):
        if key in values:
            _check_event(f"{where}.{key}", values[key])
    when = Conditions(commands=_possible(where, commands, values), **values)
    rule = Rule(name, where, when, action)
    check_rule(rule)
    return rule


def _commands(where: str, kind: ActionKind, values: dict[str, Any]) -> frozenset[Command]:
    """Take the commands out of `values`: those asked for, if the action can strike them."""
    commands = ACTIONS[kind].commands
    given = values.pop("command", None)
    if given is not None:
        asked = frozenset(word.command for word in given)
        if wrong := asked - commands:
            words = ", ".join(_word(command) for command in sorted(commands))
            raise PolicyError(
                f"{where}.command: {kind.value} cannot strike {_word(min(wrong))}; it strikes "
                f"{words}"
            )
        commands = asked
    no_fua = any(word.flag is CommandFlag.FUA for word in values.get("without_flags", ()))
    if kind is ActionKind.LIE and no_fua:
        commands &= {Command.FLUSH}
        if not commands:
            raise PolicyError(
                f"{where}.without_flags: a write without FUA promises nothing, so there is nothing "
                "to lie about; drop it"
            )
    return commands


def _action(where: str, kind: ActionKind, values: dict[str, Any]) -> Action:
    """Take an action's own keys out of `values`."""
    rule = ACTIONS[kind]
    allowed = {*rule.keys, *rule.needs, *(("delay_s", "jitter_s") if rule.waits else ())}
    own = {key: values.pop(key) for key in ACTION_KEYS if key in values}
    for key in own:
        if key not in allowed:
            raise PolicyError(
                f"{where}.{key}: does not belong to the action {kind.value}, which has "
                + (", ".join(sorted(allowed)) or "no keys")
            )
    for key in rule.needs:
        if key not in own:
            raise PolicyError(
                f"{where}.{key}: missing; the action {kind.value} needs it "
                f"({ACTION_KEYS[key].help})"
            )
    if own.get("shift", _SECTOR) % _SECTOR or own.get("shift") == 0:
        raise PolicyError(f"{where}.shift: must be a multiple of {_SECTOR} other than 0")
    return Action(kind, **own)


def _possible(
    where: str, commands: frozenset[Command], values: Mapping[str, Any]
) -> frozenset[Command]:
    """Return the commands that can fulfil the other conditions; there must be one."""
    flags = values.get("flags", 0)
    left = frozenset(c for c in commands if not flags & ~(COMMAND_RULES[c].flags | CommandFlag.FUA))
    if not left:
        raise PolicyError(f"{where}.flags: none of its commands can have these; drop some")
    for key in ("payload", "contains"):
        if key in values:
            left &= {Command.WRITE}
            if not left:
                raise PolicyError(f"{where}.{key}: only a write has a payload; drop it")
    places = [k for k in ("ranges", "region", "file", "block_share") if values.get(k) is not None]
    if places:
        left -= {Command.FLUSH}
        if not left:
            key = places[0].replace("ranges", "range")
            raise PolicyError(f"{where}.{key}: a flush has no place; drop it")
    if values.get("after_bytes") is not None and left == {Command.FLUSH}:
        raise PolicyError(
            f"{where}.after_bytes: flushes have no bytes, so the rule can never strike; count them "
            "with after_count"
        )
    return left


def _bytes(where: str, text: str) -> bytes:
    if not text.startswith("hex:"):
        found = text.encode(errors="surrogateescape")
    else:
        try:
            found = bytes.fromhex(text.removeprefix("hex:"))
        except ValueError:
            raise PolicyError(
                f'{where}: {text!r} is not hexadecimal, as "hex:c03b3998" is'
            ) from None
    if not found:
        raise PolicyError(f"{where}: is empty, so every write contains it; drop it")
    return found


def _check_event(where: str, text: str) -> None:
    for form in EVENT_FORMS:
        if text == form if not form.endswith(":") else text.startswith(form) and text != form:
            return
    raise PolicyError(
        f'{where}: {text!r} is not an event; write "first-flush", "first-write", "mark:NAME" or '
        '"qmp:EVENT"'
    )


def _word(command: Command) -> str:
    return command.name.lower().replace("_", "-")

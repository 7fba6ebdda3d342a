"""Finds rules that can never strike: by their own conditions, or as an earlier rule takes all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from nbdproxy.errors import PolicyError
from nbdproxy.policy.actions import ActionKind
from nbdproxy.policy.conditions import Conditions, PayloadKind
from nbdproxy.policy.model import Rule
from nbdproxy.requests import Command, CommandFlag


def check_rule(rule: Rule) -> None:
    """Raise PolicyError if the conditions of a rule cannot all hold."""
    when = rule.when
    for key, problem in _contradictions(when):
        raise PolicyError(f"{rule.where}.{key}: {problem}")


def _contradictions(when: Conditions) -> list[tuple[str, str]]:
    """Return the key and what is wrong with it, for each contradiction."""
    never = "so the rule can never strike; drop one of them"
    nth, every = when.nth, when.every
    asked = {"range": when.ranges, "region": when.region, "file": when.file}
    places = [key for key, place in asked.items() if place is not None]
    checks: list[tuple[bool, str, str]] = [
        (bool(when.flags & when.without_flags), "without_flags", f"contradicts flags, {never}"),
        (nth is not None and every is not None and nth % every != 0, "nth",
         f"is not an every-th, {never}"),
        (nth is not None and when.after_count is not None and nth <= when.after_count, "nth",
         f"lies within after_count, {never}"),
        (nth is not None and when.before_count is not None and nth >= when.before_count, "nth",
         f"does not lie before before_count, {never}"),
        (when.after_count is not None and when.before_count is not None
         and when.before_count <= when.after_count + 1, "before_count",
         f"leaves nothing behind after_count, {never}"),
        (every is not None and when.before_count is not None
         and ((when.after_count or 0) // every + 1) * every >= when.before_count,
         "every", f"does not come before before_count, {never}"),
        (when.after_bytes is not None and when.before_bytes is not None
         and when.before_bytes <= when.after_bytes + 1, "before_bytes",
         f"leaves nothing behind after_bytes, {never}"),
        (when.after_s is not None and when.before_s is not None
         and when.before_s <= when.after_s, "before_s",
         f"is not later than after_s, {never}"),
        (when.before_s == 0, "before_s", "is over when the serving begins; make it longer"),
        (when.since is not None and when.since == when.until, "until",
         f"is the same as since, {never}"),
        (when.contains is not None and when.payload is PayloadKind.ZERO
         and any(when.contains), "payload", f"what is all zero does not contain that, {never}"),
        (when.contains is not None and when.payload is PayloadKind.ZERO
         and not any(when.contains), "contains", "is what all zeroes are; drop it"),
        *((len(places) > 1, place, f"{' and '.join(places)} exclude each other; make two rules")
          for place in places),
        (when.until_written and not when.has_place, "until_written",
         "needs a place: range, region, file or block_share"),
        (nth is not None and when.times is not None, "times",
         "there is only one n-th; drop times"),
        (every == 1, "every", "is every one; drop it"),
    ]  # fmt: skip
    return [(key, problem) for wrong, key, problem in checks if wrong]


def check_shadows(rules: Sequence[Rule]) -> None:
    """Raise PolicyError if an earlier rule of a layer takes all that a later one could strike."""
    for earlier, later in combinations(rules, 2):
        if earlier.action.kind is ActionKind.LIE and not _can_only_be_lied_to(later):
            continue
        if _covers(earlier.when, later.when):
            raise PolicyError(
                f"{later.where}: can never strike, because {earlier.name} before it takes "
                "everything that fits it; put it first, or drop it"
            )


def _can_only_be_lied_to(rule: Rule) -> bool:
    """Tell whether all that fits a rule promises something: `lie` fits nothing else."""
    flushes = rule.when.commands == {Command.FLUSH}
    return flushes or bool(rule.when.flags & CommandFlag.FUA) or rule.action.kind is ActionKind.LIE


def _covers(wide: Conditions, narrow: Conditions) -> bool:
    """Tell whether `wide` strikes all that `narrow` could."""
    return (
        wide.always_in_time
        and narrow.commands <= wide.commands
        and narrow.flags & wide.flags == wide.flags
        and narrow.without_flags & wide.without_flags == wide.without_flags
        and wide.connection in {None, narrow.connection}
        and wide.payload in {None, narrow.payload}
        and wide.contains in {None, narrow.contains}
        and _covers_place(wide, narrow)
    )


def _covers_place(wide: Conditions, narrow: Conditions) -> bool:
    if not wide.has_place:
        return True
    if wide.block_share is not None:
        return False
    if wide.region is not None or wide.file is not None:
        return (wide.region, wide.file) == (narrow.region, narrow.file)
    assert wide.ranges is not None
    return narrow.ranges is not None and all(
        any(low <= start and end <= high for low, high in wide.ranges)
        for start, end in narrow.ranges
    )

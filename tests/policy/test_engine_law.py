"""LAWS of the engine, for random rule sets and random requests and events.

    it decides what the reference (reference.py) says, and counts strikes as it does
    the same inputs give the same decisions
    a layer that is added behind never changes what earlier layers decide
    only rules with after_s or before_s look at the clock
    what was refused because it can never strike never does

Rules are built through the real path from the tables of a file. A failing example is a seed, or a
shrunk one; `show` prints what it stands for. Not covered: doing what was decided.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import isclose

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdproxy.errors import PolicyError
from nbdproxy.policy.actions import ACTIONS, Action, ActionKind, Moment
from nbdproxy.policy.conditions import Conditions, PayloadKind
from nbdproxy.policy.engine import Decision, Engine
from nbdproxy.policy.model import Policy, Rule
from nbdproxy.policy.sense import check_rule, check_shadows
from nbdproxy.requests import MODIFYING, Command, Request
from tests.policy.reference import Asked, History, Reference, Verdict
from tests.policy.rulesets import EVENTS, history, layer, layers, places

Layers = tuple[tuple[Rule, ...], ...]

AT_ONCE = 25
"""Rule sets for each seed: Hypothesis is slower than what it drives."""

dices = st.randoms(use_true_random=False)
seeds = st.integers(0, 2**32)
slow = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
quick = settings(max_examples=100, deadline=None)
few = settings(max_examples=60, deadline=None)


def engine_of(rules: Layers, seed: int) -> Engine:
    return Engine(Policy(("p",), layers=rules), seed, places)


def decided(engine: Engine, happenings: History) -> list[Decision | None]:
    """What an engine makes of a history: a decision for each request."""
    found = []
    for one in happenings:
        if isinstance(one, str):
            engine.happened(one)
        else:
            found.append(engine.decide(one.connection, one.request, one.now_s))
    return found


def expected(reference: Reference) -> list[Verdict | None]:
    return [reference.verdict(at) for at in reference.requests]


def agree(decision: Decision | None, verdict: Verdict | None) -> bool:
    if decision is None or verdict is None:
        return decision is None and verdict is None
    same = (decision.action, decision.draw_key.rule, decision.draw_key.number) == verdict[:3]
    return same and isclose(decision.delay_s, verdict.delay_s, abs_tol=1e-9)


def show(rules: Layers, happenings: History) -> str:
    lines = [f"{rule.when} {rule.action}" for layer in rules for rule in layer]
    for one in happenings:
        lines.append(
            one if isinstance(one, str) else f"{one.connection} {one.request[:5]} {one.now_s}"
        )
    return "\n".join(lines)


def check(dice: random.Random, seed: int) -> Reference:
    """Compare the engine with the reference once."""
    rules, happenings = layers(dice), history(dice)
    reference = Reference(rules, seed, places, happenings)
    engine = engine_of(rules, seed)
    found, wanted = decided(engine, happenings), expected(reference)
    for number, (decision, verdict) in enumerate(zip(found, wanted, strict=True)):
        assert agree(decision, verdict), f"request {number}\n{show(rules, happenings)}"
    struck = Counter(
        {
            rule.name: sum(reference.strikes(rule, at) for at in reference.requests)
            for layer in rules
            for rule in layer
            if rule.action.kind is not ActionKind.PASS
        }
    )
    assert +Counter(engine.matched) == +struck, show(rules, happenings)
    return reference


@given(dices, seeds)
@slow
def test_it_decides_as_the_reference_does(dice: random.Random, seed: int) -> None:
    check(dice, seed)


@given(seeds)
@quick
def test_it_decides_as_the_reference_does_many_times(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(AT_ONCE):
        check(dice, seed)


def test_the_rule_sets_are_worth_their_name() -> None:
    """Most have rules, most rules strike, and all conditions and actions are among them."""
    dice = random.Random(1)
    kinds, conditions, sizes, strikes = Counter[ActionKind](), Counter[str](), 0, 0
    plain = Conditions(commands=frozenset())
    for seed in range(1500):
        reference = check(dice, seed)
        for rule in (rule for one in reference.layers for rule in one):
            sizes += 1
            if any(reference.strikes(rule, at) for at in reference.requests):
                strikes += 1
                kinds[rule.action.kind] += 1
                conditions.update(
                    key
                    for key in Conditions.__slots__
                    if getattr(rule.when, key) != getattr(plain, key)
                )
    assert sizes > 1500
    assert strikes > sizes / 3
    assert min(kinds[kind] for kind in ActionKind) >= 10, kinds
    assert min(conditions[key] for key in Conditions.__slots__) >= 10, conditions


@given(dices, seeds)
@few
def test_the_same_twice_gives_the_same(dice: random.Random, seed: int) -> None:
    rules, happenings = layers(dice), history(dice)
    first = decided(engine_of(rules, seed), happenings)
    assert decided(engine_of(rules, seed), happenings) == first


@given(seeds)
@few
def test_a_layer_behind_changes_nothing_before_it(seed: int) -> None:
    """But what it lets fail heals no place, which is why `until_written` is left out here."""
    dice = random.Random(seed)
    for _ in range(AT_ONCE):
        rules, behind, happenings = layers(dice), layer(dice, "behind"), history(dice)
        rules = tuple(tuple(map(without_healing, one)) for one in rules)
        before, after = engine_of(rules, seed), engine_of((*rules, behind), seed)
        alone, both = decided(before, happenings), decided(after, happenings)
        for one, other in zip(alone, both, strict=True):
            if one is not None and one.action is not None:
                assert other == one
            elif one is not None:
                assert other is not None
                assert other.delay_s >= one.delay_s
            else:
                assert other is None or other.draw_key.rule.startswith("behind/")
        assert before.matched.items() <= after.matched.items()


def without_healing(rule: Rule) -> Rule:
    return replace(rule, when=replace(rule.when, until_written=False))


@given(seeds)
@few
def test_only_rules_that_say_so_look_at_the_clock(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(AT_ONCE):
        rules, happenings = layers(dice), history(dice)
        rules = tuple(
            tuple(
                replace(rule, when=replace(rule.when, after_s=None, before_s=None)) for rule in one
            )
            for one in rules
        )
        later = [one if isinstance(one, str) else one._replace(now_s=9e9) for one in happenings]
        found = decided(engine_of(rules, seed), happenings)
        assert decided(engine_of(rules, seed), later) == found


KINDS = [ActionKind.ERROR, ActionKind.LIE, ActionKind.PASS, ActionKind.DELAY]
SOME: list[frozenset[Command]] = [
    ACTIONS[ActionKind.ERROR].commands,
    frozenset(MODIFYING),
    frozenset({Command.WRITE}),
    frozenset({Command.FLUSH}),
    frozenset({Command.READ, Command.FLUSH}),
]


def any_conditions(dice: random.Random) -> Conditions:
    """Conditions that no loader has seen: they contradict each other as they like."""
    values = {
        "flags": dice.choice((0, 0, 0, 1, 2)),
        "without_flags": dice.choice((0, 0, 0, 1, 3)),
        "connection": dice.choice((None, None, 1)),
        "payload": dice.choice((None, None, *PayloadKind)),
        "contains": dice.choice((None, None, b"A", b"\0\0")),
        "ranges": dice.choice((None, None, ((0, 4096),), ((0, 512), (256, 8192)))),
        "block_share": dice.choice((None, None, 0.5)),
    }
    turns: dict[str, tuple[object, ...]] = {
        "since": tuple(EVENTS),
        "until": tuple(EVENTS),
        "after_s": (0.0, 1.0, 2.0),
        "before_s": (0.0, 1.0, 2.0),
        "nth": (1, 2, 3),
        "every": (2, 3),
        "after_count": (1, 2, 3),
        "before_count": (2, 3, 4),
        "after_bytes": (0, 1023, 1024),
        "before_bytes": (1, 1024, 1025),
    }
    for key in dice.sample(list(turns), dice.choice((0, 0, 2, 3))):
        values[key] = dice.choice(turns[key])
    return Conditions(dice.choice(SOME), **values)


def ever_strikes(rules: tuple[Rule, ...], rule: Rule, dice: random.Random) -> bool:
    for _ in range(6):
        reference = Reference((rules,), dice.randrange(99), places, history(dice))
        if any(reference.strikes(rule, at) for at in reference.requests):
            return True
    return False


def refused(check: Callable[[], None]) -> bool:
    """Whether a check finds something that can never strike, and not only something needless."""
    try:
        check()
    except PolicyError as error:
        return "can never strike" in str(error)
    return False


def test_what_can_never_strike_never_does() -> None:
    dice, found = random.Random(7), Counter[bool]()
    while found[True] < 400:
        rule = Rule("p/1", "f", any_conditions(dice), Action(dice.choice(KINDS)))
        never = refused(lambda rule=rule: check_rule(rule))  # type: ignore[misc]
        strikes = ever_strikes((rule,), rule, dice)
        assert not (never and strikes), rule
        found[never] += 1
    assert found[False] > 400


def test_what_stands_behind_a_rule_that_takes_all_never_strikes() -> None:
    dice, found = random.Random(8), Counter[bool]()
    while found[True] < 400:
        first, second = (
            Rule(f"p/{n}", "f", any_conditions(dice), Action(dice.choice(KINDS))) for n in (1, 2)
        )
        never = refused(lambda both=(first, second): check_shadows(both))  # type: ignore[misc]
        if never:
            assert not ever_strikes((first, second), second, dice), (first, second)
        found[never] += 1


def write(number: int) -> Asked:
    return Asked(1, Request(Command.WRITE, 0, 0, 0, 4096, memoryview(bytes([number]) * 4096)), 0)


READ = Asked(1, Request(Command.READ, 0, 0, 0, 4096, memoryview(b"")), 0)
BAD = Conditions(frozenset({Command.READ}), ranges=((0, 4096),), until_written=True)


def healing(action: Action) -> Layers:
    strikes = Conditions(frozenset({Command.WRITE}))
    return (
        (Rule("p/bad", "f", BAD, Action(ActionKind.ERROR)),),
        (Rule("q/1", "f", strikes, action),),
    )


@pytest.mark.parametrize("kind", [ActionKind.ERROR, ActionKind.HANG])
def test_a_write_that_was_not_done_heals_nothing(kind: ActionKind) -> None:
    found = decided(engine_of(healing(Action(kind)), 0), [READ, write(1), READ])
    assert found[2] is not None


@pytest.mark.parametrize("kind", [ActionKind.DELAY, ActionKind.VIOLATE, ActionKind.LOSE])
def test_a_write_that_was_done_heals(kind: ActionKind) -> None:
    found = decided(engine_of(healing(Action(kind)), 0), [READ, write(1), READ])
    assert found[0] is not None
    assert found[2] is None


@pytest.mark.parametrize("moment", Moment)
def test_a_write_whose_connection_was_dropped_heals_if_it_was_done(moment: Moment) -> None:
    """Moment.BEFORE: "The request is not done, and never answered."."""
    rules = healing(Action(ActionKind.DISCONNECT, moment=moment))
    found = decided(engine_of(rules, 0), [READ, write(1), READ])
    assert (found[2] is None) == (moment is not Moment.BEFORE)

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
from math import isclose

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdproxy.policy.actions import ActionKind
from nbdproxy.policy.conditions import Conditions
from nbdproxy.policy.engine import Decision, Engine
from nbdproxy.policy.model import Policy, Rule
from tests.policy.reference import History, Reference, Verdict
from tests.policy.rulesets import history, layers, places

Layers = tuple[tuple[Rule, ...], ...]

AT_ONCE = 25
"""Rule sets for each seed: Hypothesis is slower than what it drives."""

dices = st.randoms(use_true_random=False)
seeds = st.integers(0, 2**32)
slow = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
quick = settings(max_examples=400, deadline=None)
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
    return [
        reference.verdict(at)
        for at, one in enumerate(reference.history)
        if not isinstance(one, str)
    ]


def agree(decision: Decision | None, verdict: Verdict | None) -> bool:
    if decision is None or verdict is None:
        return decision is None and verdict is None
    same = (decision.action, decision.lot.rule, decision.lot.number) == verdict[:3]
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
    # A rule that strikes in its turn is named by the verdict, or its delay goes before it.
    struck = Counter(
        {
            rule.name: sum(
                reference.strikes(rule, at)
                for at, one in enumerate(happenings)
                if not isinstance(one, str)
            )
            for layer in rules
            for rule in layer
            if rule.action.kind is not ActionKind.PASS
        }
    )
    assert +Counter(engine.struck) == +struck, show(rules, happenings)
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
        for rule in (rule for layer in reference.layers for rule in layer):
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

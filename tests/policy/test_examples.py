"""Every policy's examples are true: each is run through the real `Export` on a disk in memory.

What becomes of a session, of QEMU's monitor and of signals is in tests/interop and tests/server;
here their events only reach the export.
"""

from __future__ import annotations

import dataclasses

import pytest

from nbdproxy.policy.examples import Example, parse_step
from nbdproxy.policy.loader import load, names
from nbdproxy.server.export.dry_run import dry_run

STORIES = [
    (name, number, example)
    for name in names()
    for number, example in enumerate(load(name).examples)
]


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, _, example in STORIES],
    ids=[f"{name}-{number}" for name, number, _ in STORIES],
)
def test_it_ends_as_the_example_says(name: str, example: Example) -> None:
    assert dry_run(load(name).with_settings(example.settings), example).wrong == ()


@pytest.mark.parametrize("name", names())
def test_every_policy_has_examples(name: str) -> None:
    assert load(name).examples


@pytest.mark.parametrize("name", names())
def test_every_rule_strikes_in_an_example(name: str) -> None:
    file = load(name)
    struck: set[str] = set()
    there: set[str] = set()
    for example in file.examples:
        policy = file.with_settings(example.settings)
        there |= {rule.name for rule in policy.rules if rule.action.kind.value != "pass"}
        for played in dry_run(policy, example).played:
            struck |= set(played.rules)
    assert struck == there


@pytest.mark.parametrize("name", names())
def test_every_policy_that_cuts_has_an_example_of_a_cut(name: str) -> None:
    file = load(name)
    words = {step.event for example in file.examples for step in example.steps}
    words |= {step.word.lower() for example in file.examples for step in example.steps}
    at = {event.value for event in file.policy.cut.at}
    at |= {"vanish"} if at & {"disconnect", "eof"} else set()
    assert not at or words & at


def test_a_wrong_example_is_noticed() -> None:
    steps = tuple(parse_step(text, "") for text in ("write 0 A", "exit"))
    wrong = Example(steps, image=("A", "-"))
    assert dry_run(load("drop-unflushed").policy, wrong).wrong == ("image is - - and not A -",)
    right = dataclasses.replace(wrong, image=("-", "-"))
    assert dry_run(load("drop-unflushed").policy, right).wrong == ()
    assert dry_run(load("passthrough").policy, wrong).wrong == ()

"""What `build` and `sense` refuse, each beside what is nearly the same and makes sense.

Whatever a file says, reading it ends well or with a PolicyError of one line that names the file.
More refusals, of the file's form, are in test_loader.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.errors import PolicyError
from nbdproxy.policy.actions import ACTION_KEYS, ACTIONS, ActionKind
from nbdproxy.policy.conditions import CONDITION_KEYS, Conditions
from nbdproxy.policy.loader import read
from nbdproxy.policy.model import Rule
from nbdproxy.policy.schema import CACHE_KEYS, CUT_KEYS, FLUSH_KEYS, RULE_KEYS
from nbdproxy.requests import Command
from tests.policy.rulesets import build_tables, built, rule_table

Table = dict[str, Any]

ERROR, WRITE = {"action": "error"}, {"action": "error", "command": "write"}

REFUSED: dict[str, tuple[list[Table], str]] = {
    "flags that exclude each other": ([ERROR | {"flags": ["df", "no-hole"]}], "rule[0].flags"),
    "flags of another command": ([WRITE | {"flags": "df"}], "rule[0].flags"),
    "a payload of what has df": ([ERROR | {"flags": "df", "payload": "data"}], "rule[0].payload"),
    "bytes in a trim": ([ERROR | {"command": "trim", "contains": "a"}], "rule[0].contains"),
    "nth at before_count": ([ERROR | {"nth": 3, "before_count": 3}], "rule[0].nth"),
    "every beyond before_count": ([ERROR | {"every": 3, "before_count": 3}], "rule[0].every"),
    "no byte between": ([ERROR | {"after_bytes": 8, "before_bytes": 9}], "rule[0].before_bytes"),
    "before the beginning": ([ERROR | {"before_s": 0}], "rule[0].before_s"),
    "since and until": ([ERROR | {"since": "mark:a", "until": "mark:a"}], "rule[0].until"),
    "a mark without a name": ([ERROR | {"since": "mark:"}], "rule[0].since"),
    "bytes in zeroes": ([WRITE | {"payload": "zero", "contains": "a"}], "rule[0].payload"),
    "zeroes in zeroes": ([WRITE | {"payload": "zero", "contains": "hex:00"}], "rule[0].contains"),
    "no bytes": ([WRITE | {"contains": "hex:"}], "rule[0].contains"),
    "two places": ([ERROR | {"range": "0-1K", "file": "/a"}], "rule[0].range"),
    "times of the n-th": ([ERROR | {"nth": 2, "times": 2}], "rule[0].times"),
    "no shift": ([{"action": "misdirect", "shift": 0}], "rule[0].shift"),
    "a share of a flush": ([{"action": "lie", "command": "flush", "block_share": 1}],
                           "rule[0].block_share"),
    "a hang that waits": ([{"action": "hang", "delay_s": 1}], "rule[0].delay_s"),
    "behind the same": ([ERROR, ERROR], "rule[1]"),
    "behind a pass": ([{"action": "pass"}, ERROR | {"nth": 2}], "rule[1]"),
    "behind a wider place": ([ERROR | {"range": "0-1M"}, ERROR | {"range": "1K-2K"}], "rule[1]"),
    "behind fewer flags": ([WRITE, WRITE | {"flags": "fua"}], "rule[1]"),
    "behind the same region": ([ERROR | {"region": "ext4:journal"},
                                WRITE | {"region": "ext4:journal"}], "rule[1]"),
    "a lie behind a lie to flushes": ([{"action": "lie"}, {"action": "lie", "command": "flush"}],
                                      "rule[1]"),
    "FUA behind a lie": ([{"action": "lie"}, WRITE | {"flags": "fua"}], "rule[1]"),
    "behind one of two": ([ERROR | {"nth": 1}, ERROR, {"action": "hang"}], "rule[2]"),
}  # fmt: skip

NEARLY: dict[str, list[Table]] = {
    "flags of two commands": [ERROR | {"flags": ["no-hole", "fast-zero", "fua"]}],
    "FUA of a flush": [ERROR | {"flags": "fua", "command": "flush"}],
    "nth before before_count": [ERROR | {"nth": 2, "before_count": 3}],
    "nth behind after_count": [ERROR | {"nth": 4, "after_count": 3}],
    "every before before_count": [ERROR | {"every": 3, "before_count": 4}],
    "one byte between": [ERROR | {"after_bytes": 8, "before_bytes": 10}],
    "soon after": [ERROR | {"after_s": 0, "before_s": 0.001}],
    "since and until others": [ERROR | {"since": "mark:a", "until": "mark:b"}],
    "bytes in data": [WRITE | {"payload": "data", "contains": "hex:00"}],
    "a place and a share": [ERROR | {"range": "0-1M", "block_share": 0.1}],
    "healed share": [ERROR | {"block_share": 0.1, "until_written": True}],
    "not healed": [ERROR | {"until_written": False}],
    "once or not": [ERROR | {"once": False, "times": 2}],
    "a shift back": [{"action": "misdirect", "shift": -512}],
    "behind a share": [ERROR | {"block_share": 1}, ERROR],
    "behind what is healed": [ERROR | {"range": "0-1M", "until_written": True}, ERROR],
    "behind a narrower place": [ERROR | {"range": "1K-2K"}, ERROR | {"range": "0-1M"}],
    "behind more flags": [WRITE | {"flags": "fua"}, WRITE],
    "behind another region": [
        ERROR | {"region": "ext4:journal"},
        ERROR | {"region": "partition:1"},
    ],
    "behind another client": [ERROR | {"connection": 1}, ERROR],
    "behind another payload": [WRITE | {"payload": "zero"}, WRITE | {"payload": "data"}],
    "plain writes behind a lie": [{"action": "lie"}, WRITE],
    "behind one that is left out": [ERROR | {"enabled": False}, ERROR],
}

UNNOTICED: dict[str, tuple[list[Table], str]] = {
    "the key that the file has": ([ERROR | {"nth": 2, "once": True}], "rule[0].once"),
    "one of the two places": ([ERROR | {"region": "partition:1", "file": "/a"}], "rule[0].region"),
    "bytes of flushes": ([ERROR | {"command": "flush", "after_bytes": 0}], "rule[0].after_bytes"),
    "a lie without FUA": ([{"action": "lie", "command": "write", "without_flags": "fua"}],
                          "rule[0].without_flags"),
    "the same lie twice": ([{"action": "lie"}, {"action": "lie"}], "rule[1]"),
    "no multiple between": ([ERROR | {"every": 5, "after_count": 5, "before_count": 10}],
                            "rule[0].every"),
}  # fmt: skip
"""What can never strike, or is named by a key that the file does not have."""


@pytest.mark.parametrize(
    ("rules", "where"), [*REFUSED.values(), *UNNOTICED.values()], ids=[*REFUSED, *UNNOTICED]
)
def test_a_contradiction_is_refused(rules: list[Table], where: str) -> None:
    with pytest.raises(PolicyError) as refused:
        built(rules, "mine")
    message = str(refused.value)
    assert message.startswith(f"f.toml: {where}: ")
    assert "\n" not in message


@pytest.mark.parametrize("rules", NEARLY.values(), ids=NEARLY)
def test_what_is_nearly_one_is_taken(rules: list[Table]) -> None:
    built(rules, "mine")


def only(table: Table) -> Rule:
    (rule,) = built([table], "mine")
    return rule


def test_a_rule_as_it_is_built() -> None:
    rule = only({"action": "error", "errno": "ENOSPC", "delay_s": 1, "command": ["write", "trim"],
                 "range": ["0-1K", "1M-2M"], "once": True, "flags": "fua"})  # fmt: skip
    assert rule.name == "mine/rule 1"
    assert rule.when == Conditions(
        frozenset({Command.WRITE, Command.TRIM}),
        flags=1,
        ranges=((0, 1024), (1 << 20, 2 << 20)),
        times=1,
    )
    assert (rule.action.errno.value, rule.action.delay_s) == ("ENOSPC", 1.0)


@pytest.mark.parametrize("kind", ActionKind)
def test_an_action_strikes_all_it_can_unless_told(kind: ActionKind) -> None:
    needs = {"delay_s": 1} if ACTIONS[kind].needs else {}
    assert only({"action": kind.value} | needs).when.commands == ACTIONS[kind].commands


@pytest.mark.parametrize("kind", ActionKind)
@pytest.mark.parametrize("key", ACTION_KEYS)
def test_a_key_belongs_to_its_actions_only(kind: ActionKind, key: str) -> None:
    value = {"errno": "EIO", "moment": "after", "violation": "twice", "keep": "back", "shift": 512}
    table = (
        {"action": kind.value} | dict.fromkeys(ACTIONS[kind].needs, 1) | {key: value.get(key, 1)}
    )
    waits = ACTIONS[kind].waits and key in {"delay_s", "jitter_s"}
    if waits or key in ACTIONS[kind].keys:
        only(table)
    else:
        with pytest.raises(PolicyError, match=rf"^f.toml: rule\[0\].{key}: does not belong to"):
            only(table)


def test_only_some_actions_need_a_cache() -> None:
    for kind in ActionKind:
        needs: Table = {"delay_s": 1} if ACTIONS[kind].needs else {}
        try:
            build_tables({"rule": [{"action": kind.value} | needs]})
        except PolicyError as refused:
            assert ACTIONS[kind].cache
            assert "needs cache.holds = true" in str(refused)
        else:
            assert not ACTIONS[kind].cache


words = st.sampled_from(
    [*CONDITION_KEYS, *ACTION_KEYS, *(kind.value for kind in ActionKind), "write", "0-1K", "mark:a"]
)
values: st.SearchStrategy[object] = st.recursive(
    st.integers(-3, 9) | st.floats() | st.booleans() | st.text(max_size=6) | words
    | st.sampled_from([10**400, -(10**400), "9" * 5000, "-1K", "hex:0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)  # fmt: skip


def table_of(known: dict[str, Any]) -> st.SearchStrategy[Table]:
    return st.dictionaries(st.sampled_from(sorted(known)), values, max_size=5)


tops = st.fixed_dictionaries(
    {},
    optional={
        "cache": table_of(CACHE_KEYS) | values,
        "flush": table_of(FLUSH_KEYS) | values,
        "cut": table_of(CUT_KEYS) | values,
        "rule": st.lists(table_of(RULE_KEYS), max_size=3) | values,
        "sources": values,
    },
)


@given(tops)
@settings(max_examples=500, deadline=None)
def test_whatever_the_tables_hold_only_policy_errors_come(top: Table) -> None:
    try:
        build_tables(top)
    except PolicyError as refused:
        assert str(refused).startswith("f.toml: ")
        assert "\n" not in str(refused)


@given(st.integers(0, 2**32), st.sampled_from(sorted(RULE_KEYS)), values)
@settings(max_examples=500, deadline=None)
def test_whatever_a_key_of_a_good_rule_is_only_policy_errors_come(
    seed: int, key: str, value: object
) -> None:
    try:
        built([rule_table(random.Random(seed)) | {key: value}], "mine")
    except PolicyError as refused:
        assert str(refused).startswith("f.toml: rule[0]")
        assert "\n" not in str(refused)


NOTHING_BEHIND = '[[rule]]\naction = "error"'
ESCAPING = {
    "a number beyond all floats": "[cut]\nafter_s = 1" + "0" * 400,
    "a number of 5000 digits": "[cut]\nafter_s = " + "1" * 5000,
    "lists in lists": "sources = " + "[" * 5000,
    "a key with a newline": '"a\\nb" = 1',
    "a name with a newline": '[[rule]]\naction = "error"\nname = "a\\nb"\n' + NOTHING_BEHIND,
    "a step with a newline": '[[example]]\ndo = ["a\\nb"]\nimage = ["-"]',
}


@pytest.mark.parametrize("text", ESCAPING.values(), ids=ESCAPING)
def test_strange_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('summary = "s"\nimitates = "i"\n' + text)
    with pytest.raises(PolicyError) as refused:
        read(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)

"""Several policies as one, and --set: what goes where, and what is refused.

How composed rules decide is in test_engine_law.py and test_actions.py.
"""

from __future__ import annotations

import pytest

from nbdproxy.errors import NbdproxyError
from nbdproxy.policy.compose import load_all
from nbdproxy.policy.model import CutEvent, FlushCovers, Survivors, VolatileCache
from nbdproxy.policy.parameters import read_value


def test_none_is_passthrough() -> None:
    assert load_all([]).names == ("passthrough",)


def test_several() -> None:
    policy = load_all(["slow-disk", "unsafe", "cut-at-shutdown", "bad-sectors"])
    assert policy.names == ("slow-disk", "unsafe", "cut-at-shutdown", "bad-sectors")
    assert [layer[0].name for layer in policy.layers] == [
        "slow-disk/seeks",
        "bad-sectors/unreadable",
    ]
    assert policy.cache == VolatileCache(holds=True)
    assert policy.flush_covers is FlushCovers.NOTHING
    assert policy.cut.at == {CutEvent.EXIT, CutEvent.DISCONNECT, CutEvent.SHUTDOWN}


def test_the_one_that_says_more_of_the_cache_counts() -> None:
    policy = load_all(["drop-unflushed", "gluster-write-behind"])
    assert policy.cache == VolatileCache(holds=True, window=1 << 20)
    assert load_all(["reordering-cache", "drop-unflushed"]).cut.survives is Survivors.RANDOM


def test_settings_go_to_all_that_have_them() -> None:
    policy = load_all(
        ["slow-disk", "slow-flush", "bad-sectors"], ["delay_s=3", "slow-flush.delay_s=4"]
    )
    delays = {rule.name: rule.action.delay_s for rule in policy.rules}
    assert delays == {"slow-disk/seeks": 3, "slow-flush/slow": 4, "bad-sectors/unreadable": 3}


WRONG = {
    "twice": (["unsafe", "unsafe"], [], "the policy unsafe is there twice"),
    "two caches": (
        ["gluster-write-behind", "reordering-cache"],
        [],
        "gluster-write-behind and reordering-cache ask for different things in cache",
    ),
    "two ways to survive": (
        ["reordering-cache", "qemu-killed"],
        [],
        "ask for different things in cut.survives",
    ),
    "no such parameter": (["slow-disk"], ["speed=1"], "--set speed=1: there is no parameter speed"),
    "no such policy": (["slow-disk"], ["unsafe.x=1"], "there is no policy unsafe here"),
    "no value": (["slow-disk"], ["delay_s"], "write KEY=VALUE"),
    "a wrong value": (
        ["slow-disk"],
        ["delay_s=long"],
        "rule[0].delay_s: must be a number of seconds",
    ),
    "a value that makes no sense": (["fsyncgate"], ["nth=0"], "rule[0].nth: must be at least 1"),
    "a policy without parameters": (["unsafe"], ["x=1"], "unsafe has none"),
}


@pytest.mark.parametrize(("names", "settings", "words"), WRONG.values(), ids=WRONG)
def test_what_is_refused(names: list[str], settings: list[str], words: str) -> None:
    with pytest.raises(NbdproxyError) as refused:
        load_all(names, settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("-3", -3), ("0.5", 0.5), ("1e-9", 1e-9), ("true", True), ("false", False),
     ("64K", "64K"), ("", ""), ("a=b", "a=b")],
)  # fmt: skip
def test_a_value(text: str, value: object) -> None:
    found = read_value(text)
    assert found == value
    assert type(found) is type(value)

"""Parameters: their declaration, what --set makes of a text, and where "$name" is put in.

What --set does with several policies is in test_compose.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.errors import PolicyError
from nbdproxy.policy.compose import load_all
from nbdproxy.policy.loader import load, read
from nbdproxy.policy.parameters import Parameter, Value, read_value, settle, substitute

HEAD = 'summary = "s"\nimitates = "i"\n'
ALL = (
    HEAD
    + """
[parameters]
size = { default = "64K", help = "a size" }
on = { default = true, help = "whether" }
cuts = { default = "exit", help = "when" }
nth = { default = 2, help = "which" }
word = { default = "write", help = "what" }

[cache]
holds = "$on"
window = "$size"
[cut]
at = ["$cuts", "eof"]
[[rule]]
action = "error"
command = ["$word", "trim"]
nth = "$nth"
name = "at $nth"
"""
)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_parameter_stands_anywhere_and_has_any_type(tmp_path: Path) -> None:
    file = read(written(tmp_path, ALL))
    policy = file.policy
    assert (policy.cache.holds, policy.cache.window) == (True, 65536)
    assert sorted(event.value for event in policy.cut.at) == ["eof", "exit"]
    (rule,) = policy.rules
    assert rule.when.nth == 2
    assert rule.name == "mine/at $nth", "only a text that is nothing else is replaced"
    assert [one.name for one in file.parameters] == ["size", "on", "cuts", "nth", "word"]
    other = file.with_settings({"size": 512, "cuts": "disc", "nth": 5, "word": "read"})
    assert other.cache.window == 512
    assert other.rules[0].when.nth == 5
    assert file.with_settings({}) == policy


WRONG: list[tuple[dict[str, Value], str]] = [
    ({"size": "big"}, "cache.window: must be a number of bytes"),
    ({"size": -1}, "cache.window: must be a number of bytes"),
    ({"on": 1}, "cache.holds: must be true or false"),
    ({"on": False}, "cache.window: has no effect unless cache.holds"),
    ({"cuts": "noon"}, "cut.at: 'noon' is not one of"),
    ({"nth": 0}, "rule[0].nth: must be at least 1"),
    ({"nth": 1.5}, "rule[0].nth: must be a whole number"),
    ({"nth": True}, "rule[0].nth: must be a whole number"),
    ({"word": "flushed"}, "rule[0].command: 'flushed' is not one of"),
    ({"nht": 1}, "there is no parameter nht; did you mean nth?"),
    ({"zzz": 1}, "there is no parameter zzz; there are: size, on, cuts, nth, word"),
]


@pytest.mark.parametrize(("setting", "words"), WRONG, ids=str)
def test_a_setting_that_is_wrong(tmp_path: Path, setting: dict[str, Value], words: str) -> None:
    path = written(tmp_path, ALL)
    with pytest.raises(PolicyError) as refused:
        read(path).with_settings(setting)
    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


DECLARED = {
    "no table": ("x = 1", "parameters.x: must be a table"),
    "no default": ('x = { help = "h" }', "parameters.x.default: missing"),
    "no help": ("x = { default = 1 }", "parameters.x.help: missing"),
    "a list": ('x = { default = [1], help = "h" }', "parameters.x.default: must be a value"),
    "unknown": ('x = { default = 1, help = "h", least = 1 }', "parameters.x.least: unknown key"),
    "not used": ('x = { default = 1, help = "h" }', 'parameters.x: nothing has the value "$x"'),
}


@pytest.mark.parametrize(("text", "words"), DECLARED.values(), ids=DECLARED)
def test_a_declaration_that_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, f"{HEAD}[parameters]\n{text}\n")
    with pytest.raises(PolicyError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: {words}")


def test_an_unknown_one_is_named_with_where_it_stands(tmp_path: Path) -> None:
    text = ALL.replace('["$word"', '["$wrod"')
    with pytest.raises(PolicyError, match=r"rule\[0\].command\[0\]: .* wrod; did you mean word"):
        read(written(tmp_path, text))


def test_what_is_replaced() -> None:
    used: set[str] = set()
    content = {"a": ["$x", {"b": "$y", "c": "$x y", "d": "x"}], "e": 1, "f": "$$x"}
    values: dict[str, Value] = {"x": 1, "y": "$x", "z": 2}
    wanted = {"a": [1, {"b": "$x", "c": "$x y", "d": "x"}], "e": 1, "f": "$$x"}
    assert substitute("", content, values, used) == wanted
    assert used == {"x", "y"}


def test_settings_stand_over_defaults() -> None:
    declared = (Parameter("a", 1, ""), Parameter("b", "x", ""))
    assert settle("f", declared, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(PolicyError, match=r"^f: there is no parameter c; there are: a, b$"):
        settle("f", declared, {"c": 1})


@given(st.integers() | st.floats(allow_nan=False) | st.booleans())
def test_a_value_is_read_as_it_is_written(value: Value) -> None:
    found = read_value(str(value).lower())
    assert found == value
    assert type(found) is type(value)


@given(st.text() | st.sampled_from(["1" * 400, "1" * 5000, "nan", "-inf", "1e999", "1_0"]))
def test_whatever_is_set_only_policy_errors_come(text: str) -> None:
    try:
        load_all(["slow-disk"], [f"delay_s={text}"])
    except PolicyError as refused:
        assert "rule[0].delay_s: " in str(refused)
        assert "\n" not in str(refused)


@pytest.mark.parametrize("name", ["slow-disk", "bad-sectors", "gluster-write-behind"])
def test_the_examples_of_the_gallery_set_what_is_there(name: str) -> None:
    file = load(name)
    for example in file.examples:
        file.with_settings(example.settings)


def test_an_example_that_sets_what_the_policy_refuses(tmp_path: Path) -> None:
    story = '[[example]]\ndo = ["flush"]\nimage = ["-"]\nset = { nth = 0 }\n'
    with pytest.raises(PolicyError, match=r"example\[0\]|rule\[0\].nth: must be at least 1"):
        read(written(tmp_path, ALL + story))

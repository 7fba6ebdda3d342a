"""Steps of an example: the docstring of nbdproxy.policy.examples is the specification.

Every step that it shows is one, and means what stands beside it. Playing them is the rehearsal's,
in test_actions.py; what is no step is in test_loader.py.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.errors import PolicyError
from nbdproxy.policy import examples
from nbdproxy.policy.actions import Errno
from nbdproxy.policy.examples import Step, parse_example, parse_step
from nbdproxy.requests import Command

SHOWN = [
    text
    for line in (examples.__doc__ or "").splitlines()
    if line.startswith('    "')
    for text in re.findall(r'"([a-z]+[^"]*)"', line)
]
"""All that the docstring shows as a step."""


def test_the_docstring_shows_steps() -> None:
    assert len(SHOWN) >= 24


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_shown_is_a_step(text: str) -> None:
    assert parse_step(text, "here").text == text


def fields(text: str) -> tuple[object, ...]:
    step = parse_step(text, "here")
    return step.command, step.sector, step.count, step.letters, step.fua


@given(st.integers(0, 999), st.text("ABCxyz", min_size=1, max_size=5), st.booleans())
def test_a_write(sector: int, letters: str, fua: bool) -> None:
    text = f"write {sector} {letters}" + " fua" * fua
    assert fields(text) == (Command.WRITE, sector, len(letters), letters, fua)


@given(
    st.sampled_from([("zero", Command.WRITE_ZEROES), ("trim", Command.TRIM)]),
    st.integers(0, 999),
    st.none() | st.integers(1, 99),
    st.booleans(),
)
def test_zero_and_trim(
    verb: tuple[str, Command], sector: int, count: int | None, fua: bool
) -> None:
    text = f"{verb[0]} {sector}" + (f" {count}" if count else "") + " fua" * fua
    assert fields(text) == (verb[1], sector, count or 1, "", fua)


outcomes = st.sampled_from(["", "silence", "gone", "nonsense", *(one.value for one in Errno)])


@given(st.sampled_from(["flush", "write 0 A", "trim 1", "read 2"]), outcomes,
       st.none() | st.sampled_from([0.5, 2, 86400]))  # fmt: skip
def test_what_is_expected(request: str, outcome: str, after_s: float | None) -> None:
    if outcome == "silence" and after_s is not None:
        return  # refused: see below
    expected = (f" after {after_s}" if after_s else "") + (f" {outcome}" if outcome else "")
    step = parse_step(f"{request} ->{expected}" if expected else request, "here")
    plain = parse_step(request, "here")
    wanted = (step.text, *(getattr(plain, name) for name in Step.__slots__[1:-2]), outcome)
    assert tuple(getattr(step, name) for name in Step.__slots__) == (*wanted, after_s or 0)


NO_STEPS = [
    "write 0 A fua fua", "read 0 2 3", "read 0 -> ABC", "read 0 2 -> A", "write 0 A -> B",
    "flush -> A", "flush -> after 0", "flush -> after nan", "flush -> after -1", "wait 0",
    "wait inf", "wait 1 2", "client x", "client -1", "mark", "mark a b", "qmp", "lift -> EIO",
    "wait 1 -> EIO", "shutdown now", "flush -> EBADF", "flush -> EIO EIO", "flush EIO",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_STEPS)
def test_what_is_no_step(text: str) -> None:
    with pytest.raises(PolicyError, match=r"^here: .* is not a step; write for example "):
        parse_step(text, "here")


def test_no_reply_does_not_come_later() -> None:
    """ "after": the reply comes; "silence": there is no reply."""
    with pytest.raises(PolicyError):
        parse_step("flush -> after 2 silence", "here")


@given(st.text(max_size=20) | st.lists(st.sampled_from(
    ["write", "read", "flush", "0", "2", "A", "fua", "->", "after", "EIO", "²", "client", "wait"]
)).map(" ".join))  # fmt: skip
def test_any_text_is_a_step_or_refused(text: str) -> None:
    try:
        step = parse_step(text, "here")
    except PolicyError:
        return
    assert step.text == text
    assert (step.command is None) == bool(step.event)
    assert step.count >= 1


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ({"do": ["flush"]}, "example"),
        ({"do": ["wait 1"]}, "example"),
        ({"do": ["flush"], "image": ("AB",)}, "example.image"),
        ({"do": ["flush"], "shows": ("",)}, "example.shows"),
        ({"do": ["flush"], "image": ("A",), "shows": ("A", "-")}, "example.shows"),
        ({"do": ["flush", "read 0 2 -> AB"], "shows": ("A",)}, "example.do[1]"),
        ({"do": ["trim 3 2 -> EIO"]}, "example.do[0]"),
    ],
)
def test_an_example_that_makes_no_sense(table: dict[str, object], where: str) -> None:
    with pytest.raises(PolicyError, match=rf"^{re.escape(where)}: "):
        parse_example("example", table)


def test_a_disk_has_as_many_sectors_as_the_end_says_or_four() -> None:
    assert parse_example("e", {"do": ["flush -> EIO"]}).sectors == 4
    assert parse_example("e", {"do": ["flush"], "image": ("-", "-")}).sectors == 2
    assert parse_example("e", {"do": ["flush"], "shows": ("-",) * 9}).sectors == 9

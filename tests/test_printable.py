"""Text of others as it is printed: every character shows, and no two texts look alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.printable import printable, visible

ANY = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é [red] :bug:", "plain é [red] :bug:"),
        ("a\nb\tc\x1b[31m\x7f", r"a\nb\tc\x1b[31m\x7f"),
        ("\x85\x9b", r"\u0085\u009b"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("x\udc85\ud800", r"x\x85\ud800"),
        ("a\\nb", r"a\\nb"),
    ],
)
def test_what_does_not_show_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(ANY)
def test_every_text_shows_and_what_shows_is_left(text: str) -> None:
    assert printable(text).isprintable()
    assert visible(printable(text)) == printable(text)
    printable(text).encode()


@given(ANY, ANY)
def test_no_two_texts_look_alike(one: str, other: str) -> None:
    assert (printable(one) == printable(other)) == (one == other)


@given(ANY)
def test_an_escape_is_not_the_same_as_its_spelling(text: str) -> None:
    assert text.isprintable() or printable(printable(text)) != printable(text)

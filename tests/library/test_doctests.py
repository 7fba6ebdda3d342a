"""Every example in a docstring of the library runs, and says what it says."""

from __future__ import annotations

import doctest
import enum
import inspect
from typing import Any

import pytest

import nbdproxy
from nbdproxy import library
from nbdproxy.case.case import Case
from tests.library.conftest import Prepared

WORDS = {"Entry", "Manifest", "NbdproxyError", "Policy", "Recording", "StateId", "Where"}
"""What others' answers and questions are made of: the examples of those have it."""
PUBLIC = {name: getattr(nbdproxy, name) for name in nbdproxy.__all__ if name != "__version__"}
QUESTIONS = {
    f"Case.{name}": member
    for name, member in inspect.getmembers(Case)
    if inspect.isfunction(member) or inspect.ismethod(member)
    if not name.startswith("_") and name not in {"close", "placed"}
}
EXAMPLES: dict[str, Any] = {
    "nbdproxy": nbdproxy,
    "library": library,
    **QUESTIONS,
    **{
        name: found
        for name, found in PUBLIC.items()
        if name not in WORDS and not (inspect.isclass(found) and issubclass(found, enum.Enum))
    },
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, here: Prepared) -> None:
    known = {"nbdproxy": nbdproxy, "write_files": here.write_files, **PUBLIC}
    text = inspect.getdoc(EXAMPLES[name])
    assert text is not None and ">>>" in text, f"{name} has no example"
    test = doctest.DocTestParser().get_doctest(text, known, name, None, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)

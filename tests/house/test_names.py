"""A class or type has one name, and a name one meaning; a call says what it passes."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdproxy

ROOT = Path(nbdproxy.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def types_of(tree: ast.Module) -> Iterator[str]:
    """The classes of a module, wherever in it, and its type aliases: `Rows = NDArray[...]`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                # Constants are in capitals.
                if isinstance(target, ast.Name) and is_type_name(target.id):
                    yield target.id


def is_type_name(name: str) -> bool:
    word = name.lstrip("_")
    return word[:1].isupper() and word != word.upper()


def test_a_type_name_has_one_meaning() -> None:
    places = defaultdict(list)
    for path, tree in TREES.items():
        for name in types_of(tree):
            places[name].append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def unpacked_literals(tree: ast.AST) -> Iterator[int]:
    """The lines of `f(*(a, b))`: it hides from a linter how much is passed, and from a reader."""
    for node in ast.walk(tree):
        for argument in node.args if isinstance(node, ast.Call) else ():
            if isinstance(argument, ast.Starred) and isinstance(
                argument.value, ast.Tuple | ast.List
            ):
                yield argument.lineno


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_unpacks_a_literal(path: Path) -> None:
    assert list(unpacked_literals(TREES[path])) == []

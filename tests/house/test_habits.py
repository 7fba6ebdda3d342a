"""House rules that a reader feels: short files, short functions, a docstring on what is public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdproxy

ROOT = Path(nbdproxy.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.parent.rglob("*.py"))
FILE_LINES = 600
FUNCTION_LINES = 60


def name_of(path: Path) -> str:
    return str(path.relative_to(path.parents[1]))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring: those are for the reader."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in functions(ast.parse(text)):
        assert lines_of_code(node) <= FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_is_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), node.name
        for inner in functions(node) if isinstance(node, ast.ClassDef) else []:
            if not inner.name.startswith("_"):
                assert ast.get_docstring(inner), f"{node.name}.{inner.name}"

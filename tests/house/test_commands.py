"""Commands are thin: each asks a case, none another command, and none an oracle what it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nbdproxy
from nbdproxy.cli.app import COMMANDS

FOLDER = Path(nbdproxy.__file__).parent / "cli"
MODULES = sorted(FOLDER.glob("*.py"))
COMMAND_MODULES = {found.partition(":")[0] for found in COMMANDS.values()}
ORACLES = {"BothOracles", "KernelOracle", "QuickOracle", "Oracle"}


def imported(tree: ast.AST) -> set[str]:
    """The modules that are imported, wherever in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_imports_a_command(path: Path) -> None:
    commands = {f"nbdproxy.cli.{name}" for name in COMMAND_MODULES - {path.stem}}
    assert not commands & imported(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_oracle_is_asked_for_its_class(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"isinstance", "type"}:
            named = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
            assert not ORACLES & named, ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_timelines_are_opened_by_cases(path: Path) -> None:
    is_imported = "nbdproxy.crash.states.timeline.Timeline" in imported(ast.parse(path.read_text()))
    assert is_imported == (path.stem == "info")  # it is quick, and asks no case

"""The walls of the house: imports run downwards only, and only `server/` knows trio."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nbdproxy

ROOT = Path(nbdproxy.__file__).parent

FLOOR = {
    "errors": -1,
    "extents": 0,
    "requests": 0,
    "dice": 0,
    "sizes": 0,
    "signals": 0,
    "streams": 0,
    "private": 0,
    "machine": 0,
    "lines": 0,
    "printable": 0,
    "peers": 1,
    "nbd": 1,
    "disks": 1,
    "recording": 1,
    "policy": 2,
    "persistence": 2,
    "oracles": 2,
    "crash": 3,
    "server": 4,
    "lab": 4,
    "report": 4,
    "checker": 5,
    "cli": 6,
}
MODULES = sorted(set(ROOT.rglob("*.py")) - {ROOT / "__init__.py", ROOT / "__main__.py"})


def room(path: Path) -> str:
    """The room a file belongs to: its folder, or its own name on the ground floor."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Every absolute module name a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the whole name"
            assert node.module is not None
            found.add(node.module)
            if node.module == "nbdproxy":
                found |= {f"nbdproxy.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_has_a_floor(path: Path) -> None:
    assert room(path) in FLOOR


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "nbdproxy" or len(parts) == 1 or parts[1] == "__version__":
            continue
        there = parts[1]
        assert there == here or FLOOR[there] < FLOOR[here], f"{path}: {here} imports {there}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_server_knows_trio(path: Path) -> None:
    if room(path) != "server":
        assert not any(name.split(".")[0] == "trio" for name in imports(path)), path

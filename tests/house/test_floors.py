"""The walls of the house: imports run downwards only, and only `server/` knows trio."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nbdproxy

ROOT = Path(nbdproxy.__file__).parent

FLOOR = {
    "errors": -1,
    "extents": 0,
    "requests": 0,
    "delta_debugging": 0,
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
    "crash.states": 3,
    "crash.explore": 4,
    "crash.explore.dask": 5,
    "crash.blame": 4,
    "server.shared": 2,
    "server.below": 3,
    "server.export": 4,
    "server.front": 5,
    "server": 6,
    "state_server": 7,
    "reenactment": 4,
    "lab.guest": 5,
    "lab.workloads": 6,
    "lab": 7,
    "report": 6,
    "checker": 8,
    "case": 9,
    "library": 10,
    "cli": 10,
}
"""The rooms, and how high each is; a room within a room has a line of its own."""
PACKAGES = {name for room in FLOOR for name in [room.rpartition(".")[0]] if name}
MODULES = sorted(set(ROOT.rglob("*.py")) - {ROOT / "__init__.py", ROOT / "__main__.py"})


def room_of(module: str) -> str | None:
    """The innermost room that a module is in; None for one that is in none."""
    while module and module not in FLOOR:
        module = module.rpartition(".")[0]
    return module or None


def room(path: Path) -> str | None:
    """The room that a file is in."""
    return room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))


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
    name = ".".join(path.relative_to(ROOT).parent.parts)
    assert room(path) is not None or (name in PACKAGES and path.name == "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        package, _, module = name.partition(".")
        there = room_of(module) if package == "nbdproxy" else None
        if there is None or there == here:
            continue
        assert here is not None, f"{path} is in no room, and imports {there}"
        assert FLOOR[there] < FLOOR[here], f"{path}: {here} imports {there}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in MODULES}
    graph = {name: imports(path) & names.keys() for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_server_knows_trio(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] not in {"server", "state_server"}:
        assert not any(name.split(".")[0] == "trio" for name in imports(path)), path

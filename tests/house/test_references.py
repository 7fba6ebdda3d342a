"""Files and modules that docstrings, comments and pages name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nbdproxy

PACKAGE = Path(nbdproxy.__file__).parent
ROOT = PACKAGE.parent
TESTS = ROOT / "tests"
TEXTS = sorted(
    {*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py"), *ROOT.glob("docs/*.md")} - {Path(__file__)}
)
TEXTS += [ROOT / "README.md", ROOT / "SECURITY.md"]
QUOTED = re.compile(r"`+([^`\n]+)`+")
FILE = re.compile(r"(?:[\w-]+/)+[\w-]+\.(?:py|md|toml|txt)")
MODULE = re.compile(r"(?:nbdproxy|tests)(?:\.[A-Za-z_]\w*)+")
FOREIGN = re.compile(r"(?:doc|app|etc|vm|node_modules)/")
"""Of the NBD project, and of guests."""


def named(path: Path) -> set[str]:
    """What is quoted in a text, and has the form of a file of ours or of a module."""
    return {
        word.rstrip(".,:;)")
        for quoted in QUOTED.findall(path.read_text())
        for word in quoted.split()[:1]
    }


def is_module(name: str) -> bool:
    """Tell whether a dotted name is a module or package, or a name that stands in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.exists():
                return all(re.search(rf"\b{part}\b", file.read_text()) for part in parts[count:])
        if place.is_dir():
            return count == len(parts)
    return False


def is_file(name: str, seen_from: Path) -> bool:
    """Tell whether there is such a file: from the top, in the package, in tests, or beside it."""
    places = (ROOT, PACKAGE, TESTS, seen_from.parent, seen_from.parent.parent)
    return any((place / name).exists() for place in places)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_is_there(path: Path) -> None:
    dead = [
        name
        for name in sorted(named(path))
        if (FILE.fullmatch(name) and not FOREIGN.match(name) and not is_file(name, path))
        or (MODULE.fullmatch(name) and not is_module(name))
    ]
    assert dead == []


def test_dead_names_are_seen(tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("`crash/nowhere.py` `nbdproxy.nowhere` `crash/blame/replay.py` `nbdproxy.nbd`")
    assert named(text) >= {"crash/nowhere.py", "nbdproxy.nowhere"}
    assert not is_file("crash/nowhere.py", PACKAGE / "x.py")
    assert is_file("crash/blame/replay.py", PACKAGE / "x.py")
    assert not is_module("nbdproxy.nowhere")
    assert is_module("nbdproxy.nbd") and is_module("nbdproxy.cli.app.COMMANDS")
    assert not is_module("nbdproxy.cli.app.NO_SUCH_NAME")

"""What is printed goes through `nbdproxy.printable`: few places write to a stream themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nbdproxy

ROOT = Path(nbdproxy.__file__).parent
WRITERS = {
    "streams.py": "the streams themselves",
    "cli/console.py": "what makes lines visible, and JSON, which escapes",
    "cli/log.py": "a list's lines, made printable or JSON",
    "cli/manifest.py": "a manifest to a file, byte for byte",
    "cli/lab.py": "a manifest of the lab's own files",
    "cli/app.py": "the version",
    "crash/explore/dask/cluster.py": "what workers say, made visible",
    "lab/sqlite_image.py": "what SQLite says, made visible",
    "server/__init__.py": "the log, made visible",
}
"""Files that write to standard output or error, and what; all else asks `cli.console`."""
SOURCES = sorted(ROOT.rglob("*.py"))


def writes(tree: ast.AST) -> bool:
    """Tell whether something is written: by print, by a standard stream, or by typer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = node.value
            named = of.id if isinstance(of, ast.Name) else ""
            if named in {"sys", "typer", "click"} and node.attr in {
                *("stdout", "stderr", "__stdout__", "__stderr__", "echo", "secho"),
            }:
                return True
            if (named, node.attr) == ("structlog", "configure"):
                return True
        elif isinstance(node, ast.Name) and node.id == "print":
            return True
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_these_files_write_to_a_stream(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert writes(ast.parse(path.read_text())) == (name in WRITERS)


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"streams.py", "cli/manifest.py"}))
def test_those_that_write_lines_of_others_make_them_visible(name: str) -> None:
    text = (ROOT / name).read_text()
    assert name in {"cli/lab.py", "cli/app.py"} or "nbdproxy.printable import" in text

"""On a request's way no layer asks whether another one is there.

What is optional below an export (a cache, faults, another server, before-images, rules, a
recording) is a store that is stacked, a log of another class, or an engine without rules; never a
name that may be None. What comes with a request may be: a rule's decision, an error, a claim.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdproxy
from tests.house.test_floors import imports

ROOT = Path(nbdproxy.__file__).parent
EXPORT = "nbdproxy.server.export.export"
SESSION = ROOT / "server/front/session.py"
SESSIONS_WAY = {"_batch", "_finish", "_send", "_send_batch"}
"""The functions of a session that a request passes; the others negotiate."""

LOOKED_AT_ONCE = {"offer.py", "places.py"}
"""Read when an export is made or a policy comes into force, and not on a request's way."""

WITH_A_REQUEST = {"action", "claim", "decision", "drops", "failure", "promise", "request", "ticket"}
"""What comes with some requests only."""
SETTINGS = {"after_s", "age", "age_s", "window"}
"""Numbers of a policy that need not be set."""
CONTENT = {"old"}
"""What a place held before a change, where that has to be known."""


def path_of(module: str) -> Path:
    return ROOT.parent / (module.replace(".", "/") + ".py")


def way() -> list[Path]:
    """The server's modules from the session down to the disk."""
    found: set[Path] = set()
    left = [EXPORT]
    while left:
        module = left.pop()
        path = path_of(module)
        if module.startswith("nbdproxy.server.") and path.exists() and path not in found:
            found.add(path)
            left += imports(path)
    stores = ROOT / "server/below"
    found |= {
        path for path in stores.glob("*.py") if "store" in path.stem and path.stem != "stored"
    }
    return sorted(path for path in found | {SESSION} if path.name not in LOOKED_AT_ONCE)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a module that requests pass; a constructor is where a stack is made."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name == "__init__":
            continue
        if path != SESSION or node.name in SESSIONS_WAY:
            yield node


def asked(function: ast.AST) -> Iterator[ast.expr]:
    """What a function tests for None, but in an assertion, which chooses no way."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Assert):
            continue
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            (right,) = node.comparators
            if isinstance(right, ast.Constant) and right.value is None:
                yield node.left
        yield from asked(node)


def name_of(expression: ast.expr) -> str:
    """The last name of what is tested."""
    match expression:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ast.unparse(expression)


def test_the_way_goes_from_the_session_to_the_stores() -> None:
    names = {path.stem for path in way()}
    assert names >= {"session", "export", "fast_path", "slow_path", "active_policy", "request_log"}
    assert names >= {"image_store", "cached_store", "remote_store", "faulty_store"}


@pytest.mark.parametrize("path", way(), ids=lambda path: path.stem)
def test_no_layer_asks_whether_another_is_there(path: Path) -> None:
    allowed = WITH_A_REQUEST | SETTINGS | CONTENT
    for function in functions(path):
        found = [ast.unparse(one) for one in asked(function) if name_of(one) not in allowed]
        assert not found, f"{path.name}, {function.name}: {found}"


@pytest.mark.parametrize("path", way(), ids=lambda path: path.stem)
def test_no_layer_keeps_another_that_may_be_missing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            optional = ast.unparse(node.annotation).endswith("| None")
            fine = name_of(node.target) in WITH_A_REQUEST or path == SESSION
            assert fine or not optional, f"{path.name}: {ast.unparse(node)}"

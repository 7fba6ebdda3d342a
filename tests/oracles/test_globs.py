"""What is left out of a list: patterns as `tar --exclude` has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdproxy.oracles.globs import matcher
from nbdproxy.oracles.manifest import from_directory

CASES = [
    ("*.log", "/var/log/a.log", True),
    ("*.log", "a.log", True),
    ("*.log", "/a.log.1", False),
    ("*.log", "/a.log/b", True),
    ("/a.log", "/a.log", True),
    ("/a.log", "a.log", True),
    ("/a.log", "/var/a.log", False),
    ("cache", "/var/cache/x/y", True),
    ("cache/", "/var/cache/x", True),
    ("cache", "/var/caches", False),
    ("var/cache", "/srv/var/cache", True),
    ("a/*/d", "/a/b/c/d", True),
    ("?", "/a", True),
    ("?", "/ab", False),
    ("[ab]", "/b", True),
    ("[!ab]", "/b", False),
    ("[", "/[", True),
    ("a.b", "/axb", False),
    ("a|b", "/b", False),
    ("a\nb", "/a\nb", True),
    ("*\udcff", "/x\udcff", True),
    ("", "/a", False),
    ("/", "/a", False),
]


@pytest.mark.parametrize(("glob", "path", "is_meant"), CASES)
def test_a_pattern_means(glob: str, path: str, is_meant: bool) -> None:
    assert matcher([glob])(path) is is_meant
    assert matcher(["nothing", glob])(path) is is_meant


def test_without_patterns_nothing_is_meant() -> None:
    assert not matcher([])("/a")


def test_a_folder_that_is_left_out_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "kept/link").symlink_to("file")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/file").symlink_to("/proc/self/mem")  # not to be read
    (tmp_path / "folder").symlink_to("gone")
    found = from_directory(tmp_path, "/at", without=matcher(["/at/gone", "folder", "kept/l*"]))
    assert [entry.path for entry in found.entries] == ["/at/kept/file"]

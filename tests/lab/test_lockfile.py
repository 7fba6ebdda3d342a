"""What a lockfile says is what npm installed."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.lab.guest.build import build_lab
from nbdproxy.oracles.manifest import from_directory
from nbdproxy.oracles.npm import Tarballs, from_lock

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("project", ["small", "medium"])
def test_the_manifest_of_a_lockfile_is_what_npm_installed(project: str, tmp_path: Path) -> None:
    """Every file, mode and link, but the lockfile that npm writes for itself."""
    part = build_lab().manifests[project].parent
    with tarfile.open(part / "tree.tar") as archive:
        archive.extractall(tmp_path)
    lock = tmp_path / "app/package-lock.json"
    ours = from_lock(lock, Tarballs(cache=part / "cache"), modes=True)
    installed = from_directory(tmp_path / "app", modes=True)
    own = {"package.json", "package-lock.json"}
    assert {replace(e, mode=None) if e.path in own else e for e in installed.entries} == {
        *ours.entries,
        *(e for e in installed.entries if e.path == "node_modules/.package-lock.json"),
    }

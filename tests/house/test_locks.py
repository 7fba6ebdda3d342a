"""The lock files agree with what the package says it needs; `scripts/lock` renews them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "locks" / name).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in wanted}


def needed(texts: Iterable[str]) -> dict[str, Requirement]:
    return {canonicalize_name(one.name): one for one in map(Requirement, texts)}


@pytest.mark.parametrize("name", ["dev.txt", "lowest.txt"])
def test_a_lock_names_versions_and_no_place(name: str) -> None:
    text = (ROOT / "locks" / name).read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    for one in locked(name).values():
        [pin] = one.specifier
        assert pin.operator == "=="
        assert one.url is None


def test_checks_and_tests_run_with_versions_that_the_package_allows() -> None:
    pins = locked("dev.txt")
    wanted = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    for name, one in needed(wanted).items():
        [pin] = pins[name].specifier
        assert one.specifier.contains(pin.version), name


def test_the_lowest_versions_are_those_that_the_package_names() -> None:
    pins = locked("lowest.txt")
    for name, one in needed([*PROJECT["dependencies"], *EXTRAS["dask"]]).items():
        [lowest] = (Version(part.version) for part in one.specifier if part.operator == ">=")
        [pin] = pins[name].specifier
        # 3.4 may never have been published, and 3.4.1 be the first of it.
        release = Version(pin.version).release[: len(lowest.release)]
        assert release == lowest.release, name

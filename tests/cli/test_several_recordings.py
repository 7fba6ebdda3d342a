"""A folder of recordings, as serving several exports makes it, given where one is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Recorded
from tests.support.serving import nbdproxy


@pytest.fixture
def folder(recorded: Recorded, tmp_path: Path) -> Path:
    several = tmp_path / "several"
    several.mkdir()
    for name in ("root", "data"):
        (several / name).symlink_to(recorded.run)
    (several / "notes").mkdir()
    return several


@pytest.mark.parametrize(
    "words",
    [
        ("info",),
        ("manifest",),
        ("log",),
        ("open",),
        ("timeline",),
        ("check",),
        ("audit", "IMAGE"),
        ("explain", "/a"),
        ("explore", "--check", "true"),
        ("minimize", "--state", "s1.flushed.must", "--check", "true"),
        ("pack",),
        ("convert", "OUT", "--to", "nbd-trlog"),
    ],
    ids=lambda words: words[0],
)
def test_the_recordings_in_it_are_named(
    folder: Path, recorded: Recorded, words: tuple[str, ...]
) -> None:
    command, *rest = words
    given = {"IMAGE": recorded.image, "OUT": folder / "out"}
    done = nbdproxy(command, folder, *(given.get(word, word) for word in rest), code=2)
    assert f"{folder} is not a recording, and has some in it (data, root)" in done.stderr
    assert f"such as {folder / 'data'}" in done.stderr

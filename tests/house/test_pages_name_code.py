"""What CONTRIBUTING.md and the glossary name is there: each path, and each name in its file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "glossary.md"]
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
CODE = re.compile(r"`([^`\n]+)`")
NAME_IN_FILE = re.compile(r"`(\w+)` in `([\w./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_path_is_there(page: Path) -> None:
    quoted = (said.split()[0] for said in CODE.findall(page.read_text()))
    paths = {one for one in quoted if one.partition("/")[0] in FOLDERS and "/mine." not in one}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_name_is_in_its_file(page: Path) -> None:
    named = NAME_IN_FILE.findall(page.read_text())
    assert len(named) > 8
    for name, path in named:
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path} has no {name}"


def test_the_glossary_names_code_for_each_word() -> None:
    rows = [
        line for line in PAGES[1].read_text().splitlines() if re.match(r"\| (?!word|---)", line)
    ]
    assert len(rows) > 40
    for row in rows:
        word, meaning, code = (cell.strip() for cell in row.strip("|").split("|"))
        assert NAME_IN_FILE.fullmatch(code), word
        assert meaning.endswith((".", ".)", ":*.")), word

"""The tables of causes in the documents are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdproxy.crash.blame.causes import CAUSES, Cause
from nbdproxy.persistence.model import Level
from scripts.pages.causes import TABLES, written


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_table_is_what_the_code_says(path: Path) -> None:
    assert path.read_text() == written(path), "run scripts/cause-tables and commit"


def test_each_cause_has_its_words_and_each_layer_its_cause() -> None:
    assert list(CAUSES) == list(Cause)
    layers = [text.found for text in CAUSES.values() if isinstance(text.found, Level)]
    assert layers == [level for level in Level if level is not Level.NOTHING]
    for text in CAUSES.values():
        assert text.sentence.format(they="they", them="them", were="were")

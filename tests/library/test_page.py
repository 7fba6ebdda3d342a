"""The code on `docs/library.md` runs, from its first line to its last."""

from __future__ import annotations

import re
from pathlib import Path

import nbdproxy
from tests.library.conftest import Prepared

PAGE = Path(__file__).parent.parent.parent / "docs" / "library.md"


def test_the_page_runs(here: Prepared) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"write_files": here.write_files})


def test_each_name_on_the_page_is_public() -> None:
    named = set(re.findall(r"`([A-Z][a-z]\w+)`", PAGE.read_text()))
    assert named - {"DiskState"} <= set(nbdproxy.__all__)

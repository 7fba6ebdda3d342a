"""The tables of causes in README.md and docs/persistence.md, written from `CAUSES`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdproxy.crash.blame.causes import CAUSES
from nbdproxy.persistence.model import Level

ROOT = Path(__file__).resolve().parent.parent.parent


def who_lost_it() -> Iterator[str]:
    """Yield the lines of the README's table."""
    yield "| cause | who lost it |"
    yield "| --- | --- |"
    for cause, text in CAUSES.items():
        yield f"| `{cause.value}` | {text.who} |"


def found_by() -> Iterator[str]:
    """Yield the lines of the table of the persistence model."""
    yield "| whole once this is kept | cause |"
    yield "| --- | --- |"
    for cause, text in CAUSES.items():
        found = f"`{text.found.value}`" if isinstance(text.found, Level) else text.found
        yield f"| {found} | {cause.value} |"


TABLES: dict[Path, Callable[[], Iterator[str]]] = {
    ROOT / "README.md": who_lost_it,
    ROOT / "docs" / "persistence.md": found_by,
}
_BEGIN, _END = "<!-- scripts/cause-tables -->\n", "\n<!-- end -->\n"


def written(path: Path) -> str:
    """Return a document with its table as it should be."""
    place = re.escape(_BEGIN) + "(.*?)" + re.escape(_END)
    text, count = re.subn(
        place,
        lambda _: _BEGIN + "\n" + "\n".join(TABLES[path]()) + "\n" + _END,
        path.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, f"{path} has not one place for the table of causes"
    return text

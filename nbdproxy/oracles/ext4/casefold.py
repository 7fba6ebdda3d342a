"""Names in directories that ignore case (the feature casefold), as Linux compares them.

The kernel folds and decomposes names by Unicode 12.1 and drops what is ignorable by default; a name
that is not valid there is compared byte by byte. Python's tables are newer, and folding is stable
for characters that exist. So a name is certain if all its characters were already in Unicode 3.2,
which Python knows as well; of any other it is known what it may come to, no more.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple

FOLDED_MAX = 255
KEPT_MAX = 1 << 16
_IOTA_SUBSCRIPT = "\u0345"  # its place among other marks depends on when it is folded
_IGNORED = {
    *"\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0",
    *map(chr, [*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)]),
}


class Folded(NamedTuple):
    """A name as the kernel folds it; without `is_certain` the kernel may fold it otherwise."""

    name: bytes
    is_certain: bool
    is_valid: bool


@lru_cache(KEPT_MAX)
def fold(name: bytes) -> Folded:
    """Fold a name; one that is not valid UTF-8 is returned unchanged."""
    if name.isascii():
        return Folded(name.lower(), is_certain=True, is_valid=True)
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return Folded(name, is_certain=True, is_valid=False)
    kept = "".join(one for one in text if not _is_ignored(one))
    plain = unicodedata.normalize("NFD", kept)
    folded = unicodedata.normalize("NFD", plain.casefold()).encode()
    is_certain = (
        kept == text
        and _IOTA_SUBSCRIPT not in plain
        and len(folded) < FOLDED_MAX
        and all(unicodedata.ucd_3_2_0.category(one) not in {"Cn", "Co"} for one in text)
    )
    return Folded(folded, is_certain=is_certain, is_valid=True)


def _is_ignored(one: str) -> bool:
    return one in _IGNORED or unicodedata.category(one) == "Cf"

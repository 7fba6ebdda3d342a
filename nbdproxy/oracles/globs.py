"""Patterns of files that are left out of a list, as `tar --exclude` has them.

A pattern means a file, or a folder with all that is in it. One that begins with `/` is the whole
path from the top of the list; any other may begin at each name of a path. `*`, `?` and `[...]`
match slashes too.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

Matcher = Callable[[str], bool]
"""Tells of a path whether it is meant."""


def no_file(path: str) -> bool:  # noqa: ARG001 - a Matcher
    """Mean nothing at all."""
    return False


def matcher(globs: Sequence[str]) -> Matcher:
    """Return what tells whether a path, with or without a slash in front, is meant by a pattern."""
    if not globs:
        return no_file
    pattern = re.compile("|".join(map(_translated, globs)), re.DOTALL)
    return lambda path: pattern.search("/" + path.lstrip("/")) is not None


def _translated(glob: str) -> str:
    begin = r"\A/" if glob.startswith("/") else "/"
    body = fnmatch.translate(glob.removeprefix("./").strip("/"))[:-2]  # without its end of the text
    return rf"{begin}{body}(?:/|\Z)"

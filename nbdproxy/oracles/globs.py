"""Patterns of paths that are left out of a manifest, with the syntax of `tar --exclude`.

A pattern matches a file, or a directory with all that is in it. One that begins with `/` is matched
against the whole path from the top of the list; any other may begin at each name of a path. `*`,
`?` and `[...]` match slashes too.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

Matcher = Callable[[str], bool]
"""Tells whether a path matches."""


def no_file(path: str) -> bool:  # noqa: ARG001 - a Matcher
    """Match nothing."""
    return False


def matcher(globs: Sequence[str]) -> Matcher:
    """Return a matcher for any of the patterns; it takes paths with or without a leading slash."""
    if not globs:
        return no_file
    pattern = re.compile("|".join(map(_translated, globs)), re.DOTALL)
    return lambda path: pattern.search("/" + path.lstrip("/")) is not None


def _translated(glob: str) -> str:
    begin = r"\A/" if glob.startswith("/") else "/"
    body = fnmatch.translate(glob.removeprefix("./").strip("/"))[:-2]  # without its end of the text
    return rf"{begin}{body}(?:/|\Z)"

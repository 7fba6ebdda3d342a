"""Paths of a guest's filesystem as they can be printed anywhere."""

from __future__ import annotations


def printable(path: str) -> str:
    """Return a path with what is not UTF-8, or would move the cursor, as backslash escapes."""
    text = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

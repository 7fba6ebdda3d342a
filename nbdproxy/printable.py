"""Text of others as it can be printed anywhere: paths, marks, names, what servers and kernels say.

What does not print, would move the cursor, or would turn the line around becomes a backslash
escape: controls, newlines, bidirectional overrides, bytes that are not UTF-8, lone surrogates.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any


def printable(text: str) -> str:
    """Return a text of others with its escapes; its own backslashes are doubled, so it is exact."""
    return visible(text.replace("\\", "\\\\"))


def visible(text: str) -> str:
    """Return a text in which every character shows; one that does already is left as it is."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def made_visible(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Let nothing in a line of a log steer the terminal: structlog's form of a processor."""
    return {key: visible(it) if isinstance(it, str) else it for key, it in event.items()}


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if 0x80 <= code <= 0xFF:
        return f"\\u{code:04x}"
    return character.encode("unicode_escape").decode()

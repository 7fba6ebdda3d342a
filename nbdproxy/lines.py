"""Lines of JSON from somebody else: bounded in bytes and in depth, and then nothing raises.

For the control socket and QEMU's monitor, both ends. A line holds one object.
"""

from __future__ import annotations

import json
from typing import Any

LONGEST = 64 * 1024
"""Bytes of a line; commands and events have hundreds."""

_BRACKETS = 400
"""Opening brackets of a line, in its strings too: it cannot be deeper than it has of them."""


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line is; None if it is none, or beyond the bounds."""
    if len(line) > LONGEST or line.count(b"[") + line.count(b"{") > _BRACKETS:
        return None
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

"""Sizes as people write and read them: 4096, 4K, 10GiB; and how many there are of a thing."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(-?\d{1,30}) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int | None:
    """Return the bytes that "4K", "-512" or "10GiB" names, None if it names none."""
    match = _SIZE.fullmatch(text.strip())
    return int(match[1]) << _SHIFT[match[2].upper()] if match else None


def exact_size(count: int) -> str:
    """Return bytes as `parse_size` reads them, and as short as that can be: 512, 64K, 1M."""
    for unit in ("", "K", "M", "G"):
        if count % 1024 or not count:
            return f"{count}{unit}"
        count //= 1024
    return f"{count}T"


def size_text(count: int) -> str:
    """Return a number of bytes as people read it: 512 B, 4 KiB, 1.5 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value % 1 else f"{int(value)} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def plural(count: int, word: str) -> str:
    """Return "1 write" or "1,234 writes"."""
    return f"{count:,} {word}{'' if count == 1 else 'es' if word.endswith('sh') else 's'}"

"""Targets with faults, to show that the fuzzer finds them: an exception, a hang, and growth."""

from __future__ import annotations

import threading

_KEPT: list[bytes] = []


def crash(data: bytes) -> None:
    """Fail for inputs that begin with 0x21."""
    assert data[:1] != b"!", "a faulty target"


def hang(data: bytes) -> None:
    """Never come back from inputs that begin with 0x21; a busy loop would be traced, and grow."""
    if data[:1] == b"!":
        threading.Event().wait()


def grow(data: bytes) -> None:
    """Keep a MiB for each input."""
    _KEPT.append(b"\x01" * 1024 * 1024)

"""What the fuzzer runs, by name: a target takes one input, and any exception is a finding.

Nothing here needs the fuzzer: `tests/fuzz/test_corpus.py` runs the targets over stored inputs.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import (
    client_target,
    faulty,
    reader_targets,
    recording_target,
    replies_target,
    server_target,
)

TARGETS: dict[str, Callable[[bytes], None]] = {
    "server": server_target.run,
    "replies": replies_target.run,
    "client": client_target.run,
}
PROTOCOL = tuple(TARGETS)
"""Those that the tables give seeds for."""
TARGETS |= {"recording": recording_target.run, **reader_targets.TARGETS}

MUTATORS: dict[str, Callable[[bytes, int, int, Callable[[bytes, int], bytes]], bytes]] = {
    "recording": recording_target.mutated,
    **dict.fromkeys(("qcow2", "gpt", "ext4"), reader_targets.mutated),
}
"""How inputs of a form of their own are changed: arguments as of `recording_target.mutated`."""

FAULTY: dict[str, Callable[[bytes], None]] = {
    "faulty-crash": faulty.crash,
    "faulty-hang": faulty.hang,
    "faulty-grow": faulty.grow,
}
"""Targets that must lead to findings; only tests run them."""

"""The form of a policy file, as data: which keys there are and what each may hold.

The loader, its error messages and the documentation are driven from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nbdproxy.policy.model import CutEvent, FlushCovers


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `kind` is the type of its value; `choices` the enum it must be a value of."""

    kind: type
    help: str
    required: bool = False
    choices: type[Enum] | None = None


KEYS: dict[str, Key] = {
    "summary": Key(str, "one line for listings", required=True),
    "imitates": Key(str, "which real thing behaves like this, and the source", required=True),
    "cache.holds": Key(bool, "hold unflushed writes back from the image; default false"),
    "flush.covers": Key(str, "what a flush makes durable; default completed", choices=FlushCovers),
    "cut.at": Key(list, "events at which the power goes; default none", choices=CutEvent),
    "example": Key(list, "examples, which are run as tests"),
}
TABLES = {path.split(".")[0] for path in KEYS if "." in path}

EXAMPLE_KEYS: dict[str, Key] = {
    "do": Key(list, "what happens, in order: see nbdproxy.policy.examples", required=True),
    "image": Key(list, "what the image holds afterwards, sector by sector", required=True),
}

"""The form of a policy file, as data: which keys each of its tables has and what they may hold.

The loader, its error messages and the manual are driven from here.
"""

from __future__ import annotations

from nbdproxy.policy.actions import ACTION_KEYS, ActionKind
from nbdproxy.policy.conditions import CONDITION_KEYS
from nbdproxy.policy.keys import Form, Key
from nbdproxy.policy.model import CutEvent, FlushCovers, Order, Survivors

KEYS: dict[str, Key] = {
    "summary": Key(Form.TEXT, "one line for listings", required=True),
    "imitates": Key(Form.TEXT, "which real thing behaves like this", required=True),
    "sources": Key(Form.TEXTS, "where that is said, or was seen"),
    "parameters": Key(Form.TABLE, "what --set may change: a table for each"),
    "cache": Key(Form.TABLE, "the disk's volatile write cache; without it there is none"),
    "flush": Key(Form.TABLE, "what flushes do"),
    "cut": Key(Form.TABLE, "when the power goes, and what that leaves"),
    "rule": Key(Form.TABLES, "what goes wrong with single requests"),
    "example": Key(Form.TABLES, "short stories with their ends, which are run as tests"),
}

PARAMETER_KEYS: dict[str, Key] = {
    "default": Key(Form.ANY, "its value unless --set says otherwise", required=True),
    "help": Key(Form.TEXT, "what it is", required=True),
}

CACHE_KEYS: dict[str, Key] = {
    "holds": Key(Form.TRUTH, "hold unflushed writes back from the image; default false"),
    "window": Key(
        Form.SIZE, "bytes it holds at most; what is over that is written back; default no limit"
    ),
    "order": Key(Form.CHOICE, "which is written back first; default oldest", choices=Order),
    "age_s": Key(
        Form.SECONDS,
        "seconds after which it writes back what it holds (by the clock); default never",
        least=0.001,
    ),
}

FLUSH_KEYS: dict[str, Key] = {
    "covers": Key(
        Form.CHOICE, "what a flush makes durable; default completed", choices=FlushCovers
    ),
}

CUT_KEYS: dict[str, Key] = {
    "at": Key(Form.CHOICES, "events at which the power goes; default none", choices=CutEvent),
    "after_s": Key(
        Form.SECONDS,
        "seconds after which the power goes (by the clock); default never",
        least=0.001,
    ),
    "survives": Key(
        Form.CHOICE,
        "which unflushed writes are on the image then; default flushed: none of them",
        choices=Survivors,
    ),
}

RULE_KEYS: dict[str, Key] = {
    "name": Key(Form.TEXT, "what the recording calls it; default its number"),
    "action": Key(Form.CHOICE, "what it does", required=True, choices=ActionKind),
    "enabled": Key(Form.TRUTH, "false leaves the rule out; for parameters"),
    **CONDITION_KEYS,
    **ACTION_KEYS,
}

EXAMPLE_KEYS: dict[str, Key] = {
    "do": Key(Form.TEXTS, "what happens, in order: see nbdproxy.policy.examples", required=True),
    "image": Key(Form.TEXTS, "what the image holds afterwards, a letter for each sector"),
    "shows": Key(Form.TEXTS, "what reads show before the end, a letter for each sector"),
    "set": Key(Form.TABLE, "parameters that differ"),
    "seed": Key(Form.COUNT, "the seed of its draws; default 0"),
}

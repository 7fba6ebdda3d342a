"""The form of a policy file, as data: which keys each of its tables has and what they may hold.

The loader, its error messages and the manual are driven from here.
"""

from __future__ import annotations

from nbdproxy.policy.actions import ACTION_KEYS, ActionKind
from nbdproxy.policy.conditions import CONDITION_KEYS
from nbdproxy.policy.keys import Form, PolicyKey
from nbdproxy.policy.model import CutEvent, FlushCovers, Survivors, WriteBackOrder

KEYS: dict[str, PolicyKey] = {
    "summary": PolicyKey(Form.TEXT, "one line for listings", required=True),
    "imitates": PolicyKey(Form.TEXT, "which real thing behaves like this", required=True),
    "sources": PolicyKey(Form.TEXTS, "where that is said, or was seen"),
    "parameters": PolicyKey(Form.TABLE, "what --set may change: a table for each"),
    "cache": PolicyKey(Form.TABLE, "the disk's volatile write cache; without it there is none"),
    "flush": PolicyKey(Form.TABLE, "what flushes do"),
    "cut": PolicyKey(Form.TABLE, "when the power goes, and what that leaves"),
    "rule": PolicyKey(Form.TABLES, "what goes wrong with single requests"),
    "example": PolicyKey(Form.TABLES, "steps on a small disk and its end, run as tests"),
}

PARAMETER_KEYS: dict[str, PolicyKey] = {
    "default": PolicyKey(Form.ANY, "its value unless --set says otherwise", required=True),
    "help": PolicyKey(Form.TEXT, "what it is", required=True),
}

CACHE_KEYS: dict[str, PolicyKey] = {
    "holds": PolicyKey(Form.TRUTH, "hold unflushed writes back from the image; default false"),
    "window": PolicyKey(
        Form.SIZE, "bytes it holds at most; what is over that is written back; default no limit"
    ),
    "order": PolicyKey(
        Form.CHOICE, "which is written back first; default oldest", choices=WriteBackOrder
    ),
    "age_s": PolicyKey(
        Form.SECONDS,
        "seconds after which it writes back what it holds (by the clock); default never",
        least=0.001,
    ),
}

FLUSH_KEYS: dict[str, PolicyKey] = {
    "covers": PolicyKey(
        Form.CHOICE, "what a flush makes durable; default completed", choices=FlushCovers
    ),
}

CUT_KEYS: dict[str, PolicyKey] = {
    "at": PolicyKey(Form.CHOICES, "events at which the power goes; default none", choices=CutEvent),
    "after_s": PolicyKey(
        Form.SECONDS,
        "seconds after which the power goes (by the clock); default never",
        least=0.001,
    ),
    "survives": PolicyKey(
        Form.CHOICE,
        "which unflushed writes are on the image then; default flushed: none of them",
        choices=Survivors,
    ),
}

RULE_KEYS: dict[str, PolicyKey] = {
    "name": PolicyKey(Form.TEXT, "what the recording calls it; default its number"),
    "action": PolicyKey(Form.CHOICE, "what it does", required=True, choices=ActionKind),
    "enabled": PolicyKey(Form.TRUTH, "false leaves the rule out; for parameters"),
    **CONDITION_KEYS,
    **ACTION_KEYS,
}

EXAMPLE_KEYS: dict[str, PolicyKey] = {
    "do": PolicyKey(
        Form.TEXTS, "what happens, in order: see nbdproxy.policy.examples", required=True
    ),
    "image": PolicyKey(Form.TEXTS, "what the image holds afterwards, a letter for each sector"),
    "shows": PolicyKey(Form.TEXTS, "what reads show before the end, a letter for each sector"),
    "set": PolicyKey(Form.TABLE, "parameters that differ"),
    "seed": PolicyKey(Form.COUNT, "the seed of its draws; default 0"),
}

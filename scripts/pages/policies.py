"""The pages docs/policies.md and policies/README.md, written from the tables of the language.

scripts/policy-pages stores what `language` and `gallery` return, so they cannot say anything else
than what the loader takes.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from enum import Enum

from nbdproxy.policy import examples
from nbdproxy.policy.actions import ACTION_KEYS, ACTIONS
from nbdproxy.policy.conditions import CONDITION_KEYS
from nbdproxy.policy.keys import Form, PolicyKey
from nbdproxy.policy.loader import load, names
from nbdproxy.policy.model import CutEvent, FlushCovers, Survivors, WriteBackOrder
from nbdproxy.policy.schema import (
    CACHE_KEYS,
    CUT_KEYS,
    EXAMPLE_KEYS,
    FLUSH_KEYS,
    KEYS,
    PARAMETER_KEYS,
    RULE_KEYS,
)

_INTRO = """\
# Policies: the language

A policy is a TOML file that says what goes wrong with a disk, and when. `nbdproxy serve
--policy` lets it loose; the [gallery](../policies/README.md) has those that come along. This
page is written by `scripts/policy-pages` from the tables that the loader itself is driven by,
so what it says is what is taken. Anything else is refused, with file and key path: unknown
keys, conditions that contradict each other, rules that can never strike.

## One in five minutes

1. Copy the nearest one: `cp policies/bad-sectors.toml mine.toml`, or begin with this:

   ```toml
   summary = "The third write of the boot sector fails"
   imitates = "A sector that wears out"
   sources = ["seen last Tuesday"]

   [[rule]]
   name = "third"
   command = "write"
   range = "0-512"
   nth = 3
   action = "error"
   errno = "EIO"

   [[example]]
   do = ["write 0 A", "write 1 B", "write 0 C", "write 0 D -> EIO", "write 0 E"]
   image = ["E", "B", "-", "-"]
   ```

2. `nbdproxy policy check mine.toml` runs its examples and says for each step which rule struck.
3. `nbdproxy serve disk.img --policy mine.toml --record run1 --control vm/ctl.sock`, attach
   your guest;
   `nbdproxy ctl vm/ctl.sock status` counts how often each rule struck.
4. `nbdproxy log run1 --type fault` lists each request that a rule struck.

## How it is decided

- Within a policy the rules are asked in their order, and the first that strikes decides. A rule
  sees only requests that no earlier rule of its policy took. `pass` takes a request and does
  nothing.
- A rule first asks whether a request *fits* (command, flags, place, payload, connection) and
  whether it is *in time* (`since`, `until`, `after_s`, `before_s`). Those that are it counts;
  `nth`, `every`, `after_count` and so on are about that count, the request itself included.
- Several `--policy` work together: each decides for itself, in their order. Delays add up; the
  first other action is done, and later policies do not see that request. There is a cache if
  one has one; the power goes at the events of all. What two of them ask for and cannot both be
  is refused.
- The same requests in the same order, the same policy and the same `--seed` give the same
  decisions. Only what ends in `_s` looks at the clock. Draws hang on the seed, the rule's name
  and its count.
- Each decision that changed something is in the recording with the rule's name (`fault` events), as
  are the policies in force (`policy` events), marks and QEMU's events.

## What is where: image, cache, faults

Writes go to the image, or into the cache first if `cache.holds`. What a rule loses, tears,
misdirects or corrupts is shown by an overlay *above* both: the image stays honest, so the law
holds that it is after a cut what the recording gives. `nbdproxy ctl SOCKET lift` takes the
overlay away, a change of policy too; `serve --bake` writes it to the image at the end. A
request that gets an error, that hangs, or whose connection is dropped before it, was not done;
all others were.

A power cut ends the serving (with `--run`, when the command has ended).
"""


def language() -> str:
    """Return docs/policies.md."""
    parts = [
        _INTRO,
        "## The file\n\n" + _keys(KEYS),
        "## `[parameters]`: what `--set KEY=VALUE` may change\n\n"
        'Each is a table: `window = { default = "1M", help = "bytes that may wait" }`. '
        'Where a value in the file is the text `"$window"`, the parameter\'s value stands '
        "instead, of its own type.\n\n" + _keys(PARAMETER_KEYS),
        "## `[cache]`\n\n" + _keys(CACHE_KEYS) + "\n" + _choices("order", WriteBackOrder),
        "## `[flush]`\n\n" + _keys(FLUSH_KEYS) + "\n" + _choices("covers", FlushCovers),
        "## `[cut]`\n\n"
        + _keys(CUT_KEYS)
        + "\n"
        + _choices("at", CutEvent)
        + "\n"
        + _choices("survives", Survivors)
        + "\nA rule with the action `cut` cuts at a single request, and `nbdproxy ctl SOCKET cut` "
        "at any time.\n",
        "## `[[rule]]`\n\n"
        + _keys({k: v for k, v in RULE_KEYS.items() if k in {"name", "action", "enabled"}}),
        "### Conditions\n\nAll must hold; one that is not there asks nothing.\n\n"
        + _keys(CONDITION_KEYS),
        "### Actions\n\n" + "\n".join(_actions()) + "\n",
        "### Keys of actions\n\n" + _keys(ACTION_KEYS),
        "## `[[example]]`\n\n" + _keys(EXAMPLE_KEYS) + "\n" + _steps(),
    ]
    return "\n".join(parts)


def gallery() -> str:
    """Return policies/README.md."""
    lines = [
        "# The gallery of policies",
        "",
        "Each is a short file with its reason, its sources and its own examples, which are run as "
        "tests.",
        "`nbdproxy policy show NAME` reads like a page of the manual, `nbdproxy policy check NAME` "
        "plays the",
        "examples. How to write one: [the language](../docs/policies.md). This page is written by",
        "`scripts/policy-pages`.",
        "",
        "| policy | what goes wrong | parameters |",
        "| --- | --- | --- |",
    ]
    for name in names():
        file = load(name)
        parameters = ", ".join(f"`{one.name}={_shown(one.default)}`" for one in file.parameters)
        lines.append(f"| [{name}]({name}.toml) | {file.policy.summary} | {parameters} |")
    lines += ["", "```", "nbdproxy serve disk.img --policy slow-disk --policy bad-sectors \\"]
    lines += ["  --set share=0.01 --seed 7 --record run1 --control vm/ctl.sock", "```", ""]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keys(table: Mapping[str, PolicyKey]) -> str:
    lines = ["| key | value | meaning |", "| --- | --- | --- |"]
    for name, key in table.items():
        form = key.form.value
        if key.form in {Form.CHOICE, Form.CHOICES}:
            form = ", ".join(f"`{word}`" for word in key.words)
            form += "; or a list of them" if key.form is Form.CHOICES else ""
        required = " (required)" if key.required else ""
        lines.append(f"| `{name}` | {form} | {key.help}{required} |")
    return "\n".join(lines) + "\n"


def _choices(key: str, choices: type[Enum]) -> str:
    """Return a list of what each choice means: the text behind each member in the source."""
    lines = inspect.getsource(choices).splitlines()
    found = [f"`{key}`:\n"]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        name, equals, value = line.strip().partition(" = ")
        if equals and name.isupper():
            text = following.strip().strip('"') if following.strip().startswith('"""') else ""
            told = f": {text}" if text else ""
            found.append(f"- `{value.strip(chr(34))}`{told}")
    return "\n".join(found) + "\n"


def _actions() -> Iterator[str]:
    yield "| action | what becomes of the request | strikes | keys |"
    yield "| --- | --- | --- | --- |"
    for kind, rule in ACTIONS.items():
        words = sorted(one.name.lower().replace("_", "-") for one in rule.commands)
        commands = "everything" if len(words) == 7 else ", ".join(words)
        own = [*rule.keys, *rule.needs, *(["delay_s", "jitter_s"] if rule.waits else [])]
        keys = ", ".join(f"`{key}`" for key in dict.fromkeys(own))
        needs = "; needs `cache.holds`" if rule.cache else ""
        yield f"| `{kind.value}` | {rule.help}{needs} | {commands} | {keys} |"


def _steps() -> str:
    text = inspect.getdoc(examples) or ""
    _, _, steps = text.partition("\n\n")
    return textwrap.dedent(steps) + "\n"

"""A policy's parameters: declared in its file, changed with --set, put in where "$name" stands.

    [parameters]
    window = { default = "1M", help = "bytes that may wait" }

    [cache]
    window = "$window"

A text that is "$name" and nothing else becomes the value itself, of whatever type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbdproxy.errors import PolicyError

Value = str | int | float | bool

_REFERENCE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_-]*)")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter, as its file declares it."""

    name: str
    default: Value
    help: str


def read_value(text: str) -> Value:
    """Return what --set KEY=TEXT means: a number, true or false, or else the text."""
    if text in {"true", "false"}:
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def settle(
    where: str, declared: tuple[Parameter, ...], settings: Mapping[str, Value]
) -> dict[str, Value]:
    """Return each parameter's value; raises PolicyError for a setting that none has."""
    values = {parameter.name: parameter.default for parameter in declared}
    for name, value in settings.items():
        if name not in values:
            raise PolicyError(f"{where}: there is no parameter {name}; {_hint(name, values)}")
        values[name] = value
    return values


def substitute(where: str, content: Any, values: Mapping[str, Value], used: set[str]) -> Any:
    """Return `content` with the parameters put in, whose names are added to `used`."""
    if isinstance(content, dict):
        return {
            key: substitute(f"{where}.{key}" if where else key, one, values, used)
            for key, one in content.items()
        }
    if isinstance(content, list):
        return [
            substitute(f"{where}[{index}]", one, values, used) for index, one in enumerate(content)
        ]
    match = _REFERENCE.fullmatch(content) if isinstance(content, str) else None
    if match is None:
        return content
    if match[1] not in values:
        raise PolicyError(f"{where}: there is no parameter {match[1]}; {_hint(match[1], values)}")
    used.add(match[1])
    return values[match[1]]


def _hint(name: str, values: Mapping[str, Value]) -> str:
    near = difflib.get_close_matches(name, values, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are: {', '.join(values)}" if values else "this policy has none"

"""The keys of a policy file's tables: the forms that values have, and the check of a table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import inf, isfinite
from typing import Any

from nbdproxy.errors import PolicyError
from nbdproxy.sizes import parse_size


class Form(Enum):
    """What a value is; the text is what an error message says that it must be."""

    ANY = "a value"
    TEXT = "a text"
    TEXTS = "a list of texts"
    TRUTH = "true or false"
    COUNT = "a whole number"
    SIZE = 'a number of bytes such as 4096 or "1M"'
    OFFSET = 'a distance in bytes such as -512 or "1M"'
    SECONDS = "a number of seconds"
    SHARE = "a number above 0, and at most 1"
    CHOICE = "one of its words"
    CHOICES = "one of its words, or a list of them"
    RANGES = 'bytes from-to such as "0-1M", or a list of such'
    TABLE = "a table"
    TABLES = "a list of tables"


@dataclass(frozen=True, slots=True)
class PolicyKey:
    """One key: the form of its value, what it means, and its bounds or choices."""

    form: Form
    help: str
    required: bool = False
    choices: type[Enum] | None = None
    least: float | None = None
    most: float | None = None

    @property
    def words(self) -> list[str]:
        """What may be chosen."""
        return [choice.value for choice in self.choices or ()]


def parse(key: PolicyKey, value: object) -> object:
    """Return a value of a TOML file as the program uses it; ValueError says what it must be."""
    parsed = _PARSERS[key.form](value, key)
    if isinstance(parsed, int | float) and not isinstance(parsed, bool):
        if key.least is not None and parsed < key.least:
            raise ValueError(f"must be at least {key.least:g}")
        if key.most is not None and parsed > key.most:
            raise ValueError(f"must be at most {key.most:g}")
    return parsed


def checked(
    file: str, prefix: str, values: Mapping[str, Any], known: Mapping[str, PolicyKey]
) -> dict[str, Any]:
    """Return a table's values, parsed; raises PolicyError naming file and key path."""
    parsed = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise PolicyError(f"{file}: {prefix}{key}: unknown key; {hint}")
        try:
            parsed[key] = parse(known[key], value)
        except ValueError as wrong:
            raise PolicyError(f"{file}: {prefix}{key}: {wrong}") from None
    for key, rule in known.items():
        if rule.required and key not in values:
            raise PolicyError(f"{file}: {prefix}{key}: missing; add it ({rule.help})")
    return parsed


def _any(value: object, key: PolicyKey) -> object:
    if not isinstance(value, str | int | float | bool):
        raise ValueError(_must(key))
    return value


def _text(value: object, key: PolicyKey) -> str:
    if not isinstance(value, str):
        raise ValueError(_must(key))
    return value


def _texts(value: object, key: PolicyKey) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(_must(key))
    return tuple(_text(one, key) for one in value)


def _truth(value: object, key: PolicyKey) -> bool:
    if not isinstance(value, bool):
        raise ValueError(_must(key))
    return value


def _count(value: object, key: PolicyKey) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(_must(key))
    return value


def _bytes(value: object) -> int | None:
    if isinstance(value, str):
        return parse_size(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _size(value: object, key: PolicyKey) -> int:
    size = _bytes(value)
    if size is None or (size < 0 and key.form is Form.SIZE):
        raise ValueError(_must(key))
    return size


def _seconds(value: object, key: PolicyKey) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(_must(key))
    try:
        seconds = float(value)
    except OverflowError:  # a whole number beyond all floats
        seconds = inf
    if not isfinite(seconds):
        raise ValueError(_must(key))
    return seconds


def _share(value: object, key: PolicyKey) -> float:
    share = _seconds(value, key)
    if not 0 < share <= 1:
        raise ValueError(_must(key))
    return share


def _choice(value: object, key: PolicyKey) -> Enum:
    assert key.choices is not None
    for choice in key.choices:
        if choice.value == value:
            return choice
    raise ValueError(f"{value!r} is not one of {', '.join(key.words)}")


def _choices(value: object, key: PolicyKey) -> frozenset[Enum]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError("must not be an empty list; drop the key")
    return frozenset(_choice(one, key) for one in listed)


def _ranges(value: object, key: PolicyKey) -> tuple[tuple[int, int], ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise ValueError("must not be an empty list; drop the key")
    return tuple(_range(one, key) for one in listed)


def _range(value: object, key: PolicyKey) -> tuple[int, int]:
    low, dash, high = value.partition("-") if isinstance(value, str) else ("", "", "")
    start, end = parse_size(low), parse_size(high)
    if start is None or end is None or not dash:
        raise ValueError(_must(key))
    if start >= end:
        raise ValueError(f"{value!r} holds no byte; the end is behind the last byte")
    return start, end


def _table(value: object, key: PolicyKey) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(_must(key))
    return value


def _tables(value: object, key: PolicyKey) -> list[dict[str, object]]:
    if not isinstance(value, list):
        raise ValueError(_must(key))
    return [_table(one, key) for one in value]


def _must(key: PolicyKey) -> str:
    return f"must be {key.form.value}: {key.help}"


_PARSERS = {
    Form.ANY: _any,
    Form.TEXT: _text,
    Form.TEXTS: _texts,
    Form.TRUTH: _truth,
    Form.COUNT: _count,
    Form.SIZE: _size,
    Form.OFFSET: _size,
    Form.SECONDS: _seconds,
    Form.SHARE: _share,
    Form.CHOICE: _choice,
    Form.CHOICES: _choices,
    Form.RANGES: _ranges,
    Form.TABLE: _table,
    Form.TABLES: _tables,
}

"""Finds and reads policy files (TOML), by name or by path.

Guarantees: what is not understood is refused, with the file and the path of the key. Names are
looked up in the package (an installed wheel carries the gallery) and in the source tree.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nbdproxy.errors import PolicyError
from nbdproxy.policy.examples import Example, parse_step
from nbdproxy.policy.model import CutEvent, FlushCovers, Policy
from nbdproxy.policy.schema import EXAMPLE_KEYS, KEYS, TABLES, Key

_PACKAGE = Path(__file__).parent.parent
DIRECTORIES = (_PACKAGE / "policies", _PACKAGE.parent / "policies")
"""Where the gallery is: in an installed package, and in a source tree."""


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A policy, the examples it carries, and where it was read."""

    path: Path
    policy: Policy
    examples: tuple[Example, ...]


def names() -> list[str]:
    """Return the names in the gallery, sorted."""
    return sorted(path.stem for path in _gallery())


def load(name: str) -> PolicyFile:
    """Read a policy by its name in the gallery, or by its path if it looks like one.

    Raises PolicyError if there is none, or if the file is not a policy.
    """
    if "/" in name or name.endswith(".toml"):
        return read(Path(name))
    for path in _gallery():
        if path.stem == name:
            return read(path)
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names())}"
    raise PolicyError(f"there is no policy named {name}; {hint}")


def read(path: Path) -> PolicyFile:
    """Read one policy file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolicyError(f"there is no policy file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{path} is not TOML: {error}") from None
    values = _values(path, content)
    policy = Policy(
        name=path.stem,
        summary=values["summary"],
        imitates=values["imitates"],
        holds=values.get("cache.holds", False),
        flush_covers=FlushCovers(values.get("flush.covers", "completed")),
        cut_at=frozenset(CutEvent(event) for event in values.get("cut.at", [])),
    )
    _check_sense(path, policy)
    examples = values.get("example", [])
    return PolicyFile(path, policy, tuple(_example(path, i, e) for i, e in enumerate(examples)))


def _gallery() -> Iterator[Path]:
    for directory in DIRECTORIES:
        if directory.is_dir():
            yield from directory.glob("*.toml")
            return


def _values(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Flatten the tables to key paths, and check every key and value."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in TABLES and isinstance(value, dict):
            flat |= {f"{key}.{inner}": one for inner, one in value.items()}
        else:
            flat[key] = value
    return _checked(path, "", flat, KEYS)


def _checked(
    path: Path, prefix: str, values: dict[str, Any], keys: dict[str, Key]
) -> dict[str, Any]:
    for key, value in values.items():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(keys)}"
            raise PolicyError(f"{path}: {prefix}{key}: unknown key; {hint}")
        _check_value(path, prefix + key, value, keys[key])
    for key, rule in keys.items():
        if rule.required and key not in values:
            raise PolicyError(f"{path}: {prefix}{key}: missing; add it ({rule.help})")
    return values


def _check_value(path: Path, where: str, value: object, rule: Key) -> None:
    if not isinstance(value, rule.kind):
        raise PolicyError(f"{path}: {where}: must be of type {rule.kind.__name__}: {rule.help}")
    if rule.choices is None:
        return
    known = [choice.value for choice in rule.choices]
    for one in cast("list[object]", value) if isinstance(value, list) else [value]:
        if one not in known:
            raise PolicyError(f"{path}: {where}: {one!r} is not one of {', '.join(known)}")


def _check_sense(path: Path, policy: Policy) -> None:
    if policy.flush_covers is FlushCovers.NOTHING and not policy.holds:
        raise PolicyError(
            f"{path}: flush.covers: a flush that covers nothing has no effect unless "
            "cache.holds is true; set it, or drop this key"
        )


def _example(path: Path, index: int, content: object) -> Example:
    where = f"example[{index}]"
    if not isinstance(content, dict):
        raise PolicyError(f"{path}: {where}: must be a table with the keys do and image")
    values = _checked(path, f"{where}.", content, EXAMPLE_KEYS)
    steps = tuple(
        parse_step(str(step), f"{path}: {where}.do[{i}]") for i, step in enumerate(values["do"])
    )
    return Example(steps, tuple(str(letter) for letter in values["image"]))

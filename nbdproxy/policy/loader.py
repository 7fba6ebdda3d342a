"""Finds and reads policy files (TOML), by name or by path.

Guarantees: what is not understood is refused, with the file and the path of the key. Names are
looked up in the package (an installed wheel carries the gallery) and in the source tree.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdproxy.errors import PolicyError
from nbdproxy.policy.build import build
from nbdproxy.policy.examples import Example, parse_example
from nbdproxy.policy.keys import checked
from nbdproxy.policy.model import Policy
from nbdproxy.policy.parameters import Parameter, Value, settle, substitute
from nbdproxy.policy.schema import EXAMPLE_KEYS, KEYS, PARAMETER_KEYS

_PACKAGE = Path(__file__).parent.parent
DIRECTORIES = (_PACKAGE / "policies", _PACKAGE.parent / "policies")
"""Where the gallery is: in an installed package, and in a source tree."""


SIZE_MAX = 256 * 1024
"""Bytes of a policy file; the longest of the gallery has a hundredth."""
PARTS_MAX = 100
"""Dots of a line outside its strings, and brackets, of which a reader takes memory for each."""
_STRINGS = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*')


def too_deep(text: str) -> bool:
    """Tell whether a key has so many parts, or a value so many brackets, that reading takes long.

    The standard library's reader takes memory with the square of a dotted key's parts.
    """
    lines = _STRINGS.sub("0", text).splitlines()
    return any(line.count(".") > PARTS_MAX or line.count("[") > PARTS_MAX for line in lines)


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A policy, the examples and parameters it has, and where it was read."""

    path: Path
    policy: Policy
    parameters: tuple[Parameter, ...]
    examples: tuple[Example, ...]
    content: Mapping[str, Any]
    """The file as it is, parameters not put in."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.path.stem

    def with_settings(self, settings: Mapping[str, Value]) -> Policy:
        """Return the policy with other parameters; raises PolicyError if it has none of these."""
        return _policy(self.path, self.content, self.parameters, settings)


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
    text = _text(path)
    if too_deep(text):
        raise PolicyError(
            f"{path} has a key of more than {PARTS_MAX} parts, or brackets as deep; no policy "
            "needs that: mend it"
        )
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and lists beyond all bounds
        raise PolicyError(f"{path} is not TOML: {error}") from None
    top = checked(str(path), "", content, KEYS)
    parameters = tuple(_parameters(path, top.get("parameters", {})))
    policy = _policy(path, content, parameters, {})
    examples = tuple(
        parse_example(
            f"{path}: example[{index}]",
            checked(str(path), f"example[{index}].", one, EXAMPLE_KEYS),
        )
        for index, one in enumerate(top.get("example", []))
    )
    file = PolicyFile(path, policy, parameters, examples, content)
    for index, example in enumerate(examples):
        try:
            file.with_settings(example.settings)
        except PolicyError as wrong:
            said = str(wrong).removeprefix(f"{path}: ")
            raise PolicyError(f"{path}: example[{index}].set: {said}") from None
    return file


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_MAX + 1)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise PolicyError(f"there is no policy file {path}; check the path") from None
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path} cannot be read: {error}; save it as UTF-8") from None
    if len(raw) > SIZE_MAX:
        raise PolicyError(f"{path} is larger than {SIZE_MAX >> 10} KiB; split the policy")
    # The line ends of other systems, as a text file is read.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parameters(path: Path, table: Mapping[str, object]) -> Iterator[Parameter]:
    for name, one in table.items():
        if not isinstance(one, dict):
            raise PolicyError(
                f"{path}: parameters.{name}: must be a table: "
                '{ default = 1, help = "what it is" }'
            )
        values = checked(str(path), f"parameters.{name}.", one, PARAMETER_KEYS)
        yield Parameter(name, values["default"], values["help"])


def _policy(
    path: Path,
    content: Mapping[str, Any],
    parameters: Sequence[Parameter],
    settings: Mapping[str, Value],
) -> Policy:
    values = settle(str(path), tuple(parameters), settings)
    used: set[str] = set()
    tables = {key: one for key, one in content.items() if key not in {"parameters", "example"}}
    try:
        tables = substitute("", tables, values, used)
    except PolicyError as wrong:
        raise PolicyError(f"{path}: {wrong}") from None
    for parameter in parameters:
        if parameter.name not in used:
            raise PolicyError(
                f'{path}: parameters.{parameter.name}: nothing has the value "${parameter.name}"; '
                "use it, or drop it"
            )
    return build(str(path), path.stem, checked(str(path), "", tables, KEYS))


def _gallery() -> Iterator[Path]:
    for directory in DIRECTORIES:
        if directory.is_dir():
            yield from directory.glob("*.toml")
            return

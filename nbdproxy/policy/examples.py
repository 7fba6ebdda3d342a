"""The examples a policy file carries: steps on a small disk, and what it holds afterwards.

Steps are done one after the other, on a disk of a few sectors that first holds `-` everywhere:

    "write 0 A"       write sector 0 full of the letter A; "write 0 AB" writes sectors 0 and 1
    "write 0 A fua"   the same with FUA
    "zero 0"          WRITE_ZEROES of sector 0, "zero 0 2" of two sectors; they then hold "0"
    "trim 0"          TRIM, in the same way
    "read 0"          a read of sector 0, "read 0 2" of two
    "flush"           a flush
    "client 2"        what follows is client 2's, which connects if it is new
    "wait 1.5"        seconds pass
    "mark NAME"       somebody says `nbdproxy ctl SOCKET mark NAME`
    "qmp EVENT"       QEMU reports an event; "shutdown", "reset" and "powerdown" are short for three
    "lift"            the faults are lifted
    "disconnect"      the client says DISC; "vanish": it goes away without
    "exit"            nbdproxy ends

A request may say what it expects behind "->", and is expected to succeed if it does not (or to get
no answer, if the power has gone):

    "write 0 A -> EIO"    the reply is an error        "read 0 -> B"       the read gets that
    "flush -> silence"    there is no reply            "read 0 -> gone"    the connection is dropped
    "flush -> nonsense"   the reply breaks the protocol
    "flush -> after 2"    the reply comes seconds later, and says what follows, if anything

`shows` lists the letter that reads get of each sector before the end, `image` what the image holds
after it: "?" is a sector that is not one letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nbdproxy.errors import PolicyError
from nbdproxy.policy.actions import Errno
from nbdproxy.policy.parameters import Value
from nbdproxy.requests import Command

SILENCE, GONE, NONSENSE = "silence", "gone", "nonsense"

_VERBS = {
    "read": Command.READ,
    "write": Command.WRITE,
    "zero": Command.WRITE_ZEROES,
    "trim": Command.TRIM,
    "flush": Command.FLUSH,
}
_PLAIN = {"disconnect", "vanish", "exit", "lift"}
_QMP = {"shutdown": "SHUTDOWN", "reset": "RESET", "powerdown": "POWERDOWN"}
_WORD = {"client", "wait", "mark", "qmp"}
_EXAMPLES = '"write 0 A", "write 0 A fua -> EIO", "read 0 -> B", "zero 0", "flush", "wait 1"'


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a request, or an event by name.

    command       None for an event
    count         sectors, from `sector` on
    letters       of a write, one for each sector
    event, word   the event, and what stands behind it
    outcome       what is expected: an error's name, the letters of a read, SILENCE, GONE, NONSENSE
                  or nothing for success
    after_s       when the reply is expected, in seconds
    text          the step as it was written
    """

    text: str
    command: Command | None
    sector: int = 0
    count: int = 1
    letters: str = ""
    fua: bool = False
    event: str = ""
    word: str = ""
    outcome: str = ""
    after_s: float = 0


@dataclass(frozen=True, slots=True)
class Example:
    """Steps and their end; `image` and `shows` have a letter for each sector, or are empty."""

    steps: tuple[Step, ...]
    image: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    settings: Mapping[str, Value] = field(default_factory=dict)
    seed: int = 0

    @property
    def sectors(self) -> int:
        """How many sectors its disk has."""
        return len(self.image or self.shows) or 4


def parse_example(where: str, values: Mapping[str, Any]) -> Example:
    """Return the example of a table whose values have been checked."""
    steps = tuple(parse_step(step, f"{where}.do[{i}]") for i, step in enumerate(values["do"]))
    image, shows = values.get("image", ()), values.get("shows", ())
    if not image and not shows and not any(step.outcome or step.after_s for step in steps):
        raise PolicyError(f"{where}: says nothing that could be wrong; add image, shows or an ->")
    if image and shows and len(image) != len(shows):
        raise PolicyError(f"{where}.shows: has not as many sectors as image")
    for key, letters in (("image", image), ("shows", shows)):
        if not all(len(letter) == 1 and _is_letter(letter) for letter in letters):
            raise PolicyError(f'{where}.{key}: has a letter for each sector, such as ["A", "-"]')
    example = Example(steps, image, shows, values.get("set", {}), values.get("seed", 0))
    for index, step in enumerate(steps):
        if step.command not in {None, Command.FLUSH} and step.sector + step.count > example.sectors:
            raise PolicyError(
                f"{where}.do[{index}]: the disk has {example.sectors} sectors, as image or shows "
                "says; use them only"
            )
    return example


def parse_step(text: str, where: str) -> Step:
    """Read one step; raises PolicyError naming `where` it stands."""
    said, arrow, expected = text.partition("->")
    words = said.split()
    verb, rest = (words[0], words[1:]) if words else ("", [])
    step = None
    if verb in _VERBS:
        step = _request(text, _VERBS[verb], rest)
    elif verb in _PLAIN and not rest and not arrow:
        step = Step(text, None, event=verb)
    elif verb in _QMP and not rest and not arrow:
        step = Step(text, None, event="qmp", word=_QMP[verb])
    elif verb in _WORD and len(rest) == 1 and not arrow and _is_good(verb, rest[0]):
        step = Step(text, None, event=verb, word=rest[0])
    if step is not None and arrow:
        step = _expecting(step, expected.split())
    if step is None:
        raise PolicyError(f'{where}: "{text}" is not a step; write for example {_EXAMPLES}')
    return step


def _is_good(verb: str, word: str) -> bool:
    if verb == "client":
        return word.isdecimal() and int(word) > 0
    if verb == "wait":
        return _seconds(word) is not None
    return True


def _is_letter(letter: str) -> bool:
    """Tell whether a sector can be full of it: one byte that can be seen."""
    return letter.isascii() and letter.isprintable()


def _seconds(word: str) -> float | None:
    try:
        seconds = float(word)
    except ValueError:
        return None
    return seconds if 0 < seconds <= 86400 else None


def _request(text: str, command: Command, words: list[str]) -> Step | None:
    fua = words[-1:] == ["fua"]
    words = words[: len(words) - fua]
    if command is Command.FLUSH:
        return Step(text, command) if not words and not fua else None
    if not words or not words[0].isdecimal() or (fua and command is Command.READ):
        return None
    sector = int(words[0])
    if command is Command.WRITE:
        if len(words) != 2 or not all(map(_is_letter, words[1])):
            return None
        return Step(text, command, sector, len(words[1]), words[1], fua)
    if len(words) > 2 or (len(words) == 2 and not (words[1].isdecimal() and int(words[1]))):
        return None
    return Step(text, command, sector, int(words[1]) if len(words) == 2 else 1, fua=fua)


def _expecting(step: Step, words: list[str]) -> Step | None:
    after_s = 0.0
    if words[:1] == ["after"] and len(words) > 1:
        seconds = _seconds(words[1])
        if seconds is None:
            return None
        after_s, words = seconds, words[2:]
    if len(words) > 1 or not (words or after_s):
        return None
    outcome = words[0] if words else ""
    known = {SILENCE, GONE, NONSENSE, *(errno.value for errno in Errno)}
    reads = step.command is Command.READ and len(outcome) == step.count
    if outcome and outcome not in known and not reads:
        return None
    if after_s and outcome == SILENCE:
        return None
    return replace(step, outcome=outcome, after_s=after_s)

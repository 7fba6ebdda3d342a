"""The examples a policy file carries: a short story, and what the image holds afterwards.

A story is a list of steps on a disk of a few sectors that holds `-` everywhere at the start:

    "write 0 A"       write sector 0 full of the letter A
    "write 0 A fua"   the same with FUA
    "zero 0"          WRITE_ZEROES of sector 0; it then holds "0"
    "trim 0"          TRIM of sector 0; it then holds "0"
    "flush"           a flush, answered
    "disconnect"      the client says DISC
    "shutdown"        QEMU reports SHUTDOWN on its QMP socket
    "exit"            nbdproxy ends

`image` lists the letter of each sector at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdproxy.errors import PolicyError
from nbdproxy.requests import Command

EVENTS = ("disconnect", "shutdown", "exit")
_VERBS = {"write": Command.WRITE, "zero": Command.WRITE_ZEROES, "trim": Command.TRIM}


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a request on one sector, or an event by name."""

    command: Command | None
    sector: int = 0
    letter: str = ""
    fua: bool = False
    event: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One story and its end; `image` has a letter for each sector."""

    steps: tuple[Step, ...]
    image: tuple[str, ...]


def parse_step(text: str, where: str) -> Step:
    """Read one step; raises PolicyError naming `where` it stands."""
    words = text.split()
    if text == "flush":
        return Step(Command.FLUSH)
    if text in EVENTS:
        return Step(None, event=text)
    verb = words[0] if words else ""
    fua = words[-1:] == ["fua"]
    arguments = words[1 : len(words) - fua]
    if verb in _VERBS and len(arguments) == (2 if verb == "write" else 1):
        sector, *letter = arguments
        if sector.isdecimal() and all(len(one) == 1 for one in letter):
            return Step(_VERBS[verb], int(sector), letter[0] if letter else "0", fua)
    raise PolicyError(
        f'{where}: "{text}" is not a step; write for example "write 0 A", "write 0 A fua", '
        f'"zero 0", "trim 0", "flush" or one of {", ".join(EVENTS)}'
    )

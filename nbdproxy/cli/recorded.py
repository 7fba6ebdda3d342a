"""Opens a recording for a command, and says what is not there of it any more.

A recording whose end is lost goes up to where it can be read, and `end` is there. What is
said of an earlier instant stands; of that one, that all is well cannot be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbdproxy.cli.console import err
from nbdproxy.crash.states.recorded import RecordedSource

if TYPE_CHECKING:  # it takes most of a second, and not all commands ask one
    from nbdproxy.case.case import Case


@contextmanager
def recorded(
    run: Path, base: Path | None = None, *, name: bool = False, note: bool = True
) -> Iterator[RecordedSource]:
    """Have a recording open; `base` is where its image is now.

    Says on stderr what is missing, with the recording's `name` where there are several; without
    `note` the command says it itself.
    """
    with RecordedSource(run, image=base) as source:
        if note and source.missing:
            warn(f"{f'{run}: ' if name else ''}{source.missing}")
        yield source


def warn(text: str) -> None:
    """Say on stderr what an answer does not cover."""
    err.print(f"note: {text}", markup=False)


@contextmanager
def telling(case: Case, what: str) -> Iterator[None]:
    """Show on stderr, as long as a block runs, what is done for a case; at first it is `what`."""
    with err.status(what) as status:
        before, case.tell = case.tell, status.update
        try:
            yield
        finally:
            case.tell = before


def code_at(source: RecordedSource, position: int, code: int = 0) -> int:
    """Return a command's exit code: 2 instead of 0 if it is of an end that is lost.

    `position` is the latest that the answer is about.
    """
    lost = source.is_damaged and position >= source.events
    return 2 if lost and code == 0 else code

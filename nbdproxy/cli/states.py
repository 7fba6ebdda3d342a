"""Options that name a state, and the disk that they mean: of a recording, or an image as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.states import DiskState, StateChoice
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.crash.states.recorded import is_recording
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.formats import refuse_foreign
from nbdproxy.errors import UsageError
from nbdproxy.persistence.modes import CacheMode, Failure
from nbdproxy.recording.reader import no_recording

State = Annotated[
    str | None, typer.Option(metavar="ID", help="A state's id, as replay --json tells it.")
]
StateAt = Annotated[str | None, typer.Option(metavar="CUT", help="The disk at this instant.")]
StateMode = Annotated[CacheMode | None, typer.Option(help="The worst state of this mode...")]
StateFailure = Annotated[Failure | None, typer.Option(help="...and this failure.")]


@contextmanager
def disk_state(
    where: Path, choice: StateChoice, base: Path | None
) -> Iterator[tuple[DiskState, int]]:
    """Yield the disk in the state that is meant, and the exit code where all is well with it.

    That is 2 if it is the state at an end that is lost.
    """
    if where.is_dir() and not is_recording(where):
        raise no_recording(where)
    if not is_recording(where):
        if not choice.is_empty or base is not None:
            raise UsageError(f"{where} is no recording: it has one state only; drop the options")
        with closing(FileDisk(where, read_only=True)) as disk:
            refuse_foreign(disk)
            yield DiskState(str(where), disk), 0
        return
    with recorded(where, base) as source, Case([source]) as case:
        state = case.state(choice)
        yield state, code_at(source, state.position or 0)

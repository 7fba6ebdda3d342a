"""Which state of a recording a user means: its id, or an instant and what struck then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from nbdproxy.crash.blame.replay import level_at
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, ManifestError, UsageError
from nbdproxy.oracles.locate import Where, survey_tree
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode, Failure

T = TypeVar("T")

State = Annotated[
    str | None, typer.Option(metavar="ID", help="A state's id, as replay --json tells it.")
]
StateAt = Annotated[str | None, typer.Option(metavar="CUT", help="The disk at this instant.")]
StateMode = Annotated[CacheMode | None, typer.Option(help="The worst state of this mode...")]
StateFailure = Annotated[Failure | None, typer.Option(help="...and this failure.")]


def choose(
    timeline: Timeline,
    state: str | None,
    at: str | None,
    mode: CacheMode | None,
    failure: Failure | None,
) -> StateId:
    """Return the state that a command's options name; UsageError if they do not name one."""
    if state is not None:
        if at is not None or mode is not None or failure is not None:
            raise UsageError("--state says all; drop --at, --mode and --failure")
        return parse_state_id(state)
    if at is None:
        raise UsageError("which state? name it with --state ID or --at CUT")
    if (mode is None) != (failure is None):
        raise UsageError("--mode and --failure go together; give both or neither")
    position = resolve(timeline.source, at).position
    if mode is None or failure is None:
        return StateId(position, Level.RECEIVED, Choice.ALL)
    level = level_at(timeline.table, position, mode, failure)
    return StateId(position, level, Choice.MUST)


def tree_of_disk(
    oracle: Oracle, disk: ReadableDevice, timeline: Timeline | None, where: Where
) -> Tree:
    """Return the guest's tree: where the most is there, at the end, or else in the state itself.

    Raises FilesystemError if there is none, or it is not clear what is mounted where.
    """
    return at_the_end_or_here(
        disk, timeline, lambda one, other: survey_tree(oracle, one, where, other)
    )


def at_the_end_or_here(
    disk: ReadableDevice,
    timeline: Timeline | None,
    find: Callable[[ReadableDevice, ReadableDevice | None], T],
) -> T:
    """Return what is found when all has been sent, or else in the state itself.

    `find` is given the one to look at, and the other. Raises what it raises: FilesystemError or
    ManifestError.
    """
    if timeline is None:
        return find(disk, None)
    end = timeline.at(timeline.source.events)
    try:
        return find(end, disk)
    except (FilesystemError, ManifestError) as at_the_end:
        try:
            return find(disk, end)
        except (FilesystemError, ManifestError):
            raise at_the_end from None

"""Which state of a disk is meant: a recording's, by its id or by what struck when, or an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from nbdproxy.crash.blame.places import at_the_end_or_there
from nbdproxy.crash.blame.replay import level_at
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import UsageError
from nbdproxy.oracles.locate import Where, survey_tree
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode, Failure

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StateChoice:
    """What names a state: its `state` id alone; or a cut, and perhaps a mode and a failure.

    At a cut alone it is the disk with all that had been sent by then, with mode and failure the
    worst state that these allow.

    >>> StateChoice(at="before-exit", mode=CacheMode.NONE, failure=Failure.HOST_POWER_LOSS).is_empty
    False
    """

    state: str | None = None
    at: str | None = None
    mode: CacheMode | None = None
    failure: Failure | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said."""
        return not any((self.state, self.at, self.mode, self.failure))

    def of(self, timeline: Timeline) -> StateId:
        """Return the state of a recording; UsageError if none is named."""
        if self.state is not None:
            if self.at is not None or self.mode is not None or self.failure is not None:
                raise UsageError("--state says all; drop --at, --mode and --failure")
            return parse_state_id(self.state)
        if self.at is None:
            raise UsageError("which state? name it with --state ID or --at CUT")
        if (self.mode is None) != (self.failure is None):
            raise UsageError("--mode and --failure go together; give both or neither")
        position = resolve(timeline.source, self.at).position
        if self.mode is None or self.failure is None:
            return StateId(position, Level.RECEIVED, Choice.ALL)
        level = level_at(timeline.table, position, self.mode, self.failure)
        return StateId(position, level, Choice.MUST)


@dataclass(frozen=True, slots=True)
class DiskState:
    """A disk in one state: of a timeline, or as an image is.

    `position` is the cut that it is of, None for an image.
    """

    name: str
    disk: ReadableDevice
    timeline: Timeline | None = None
    position: int | None = None

    def found(self, find: Callable[[ReadableDevice, ReadableDevice | None], T]) -> T:
        """Return what is found when all has been sent, or else in the state itself.

        `find` is given the disk to look at, and the other, None if there is none. Raises what it
        raises: FilesystemError or ManifestError.
        """
        if self.timeline is None:
            return find(self.disk, None)
        return at_the_end_or_there(find, self.timeline.at(self.timeline.source.events), self.disk)

    def tree(self, oracle: Oracle, where: Where) -> Tree:
        """Return the guest's tree.

        Raises FilesystemError if there is none, or it is not clear what is mounted where.
        """
        return self.found(lambda one, other: survey_tree(oracle, one, where, other))

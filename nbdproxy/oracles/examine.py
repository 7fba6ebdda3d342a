"""The examination of a filesystem as a whole: whether it mounts, what its journal changes, fsck."""

from __future__ import annotations

from dataclasses import dataclass

from nbdproxy.extents import Extent


@dataclass(frozen=True, slots=True)
class Fsck:
    """What the filesystem's own checker says of it, once the journal is replayed."""

    clean: bool | None
    """None if that cannot be told: it is not there, or failed itself."""
    said: str
    """Its last lines, or why it cannot be told."""


@dataclass(frozen=True, slots=True)
class Examination:
    """One filesystem in one state.

    mounts    whether a kernel mounts it; None if that cannot be told
    reason    why it does not, or why it cannot be told
    replayed  the bytes of the disk that the replay of the journal changes
    fsck      what the checker found, or why none was to be run
    """

    mounts: bool | None
    reason: str | None
    replayed: tuple[Extent, ...]
    fsck: Fsck | str

"""Where files are on recorded disks: looked for where the most is there, at the end of a recording.

What is not found there is looked for in the state that is asked about, as what a guest removed
afterwards is there only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from nbdproxy.crash.states.cuts import Cut
from nbdproxy.crash.states.rooted import with_root
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles.locate import ANYWHERE, Where, locate_all
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.quick import QUICK

D = TypeVar("D")
T = TypeVar("T")


def at_the_end_or_there(find: Callable[[D, D | None], T], end: D, there: D | None) -> T:
    """Return what is found at the end, or else in another state, None if there is no other.

    `find` is given the one to look at, and the other. Raises what it raises of the end:
    FilesystemError or ManifestError.
    """
    try:
        return find(end, there)
    except (FilesystemError, ManifestError) as at_the_end:
        if there is None:
            raise
        try:
            return find(there, end)
        except (FilesystemError, ManifestError):
            raise at_the_end from None


def place(
    timelines: Sequence[Timeline],
    manifest: Manifest,
    cuts: Sequence[Cut],
    where: Where = ANYWHERE,
    oracle: Oracle = QUICK,
    *,
    names: Sequence[str] = (),
) -> tuple[list[Tree], Manifest]:
    """Return each disk's part of the guest's tree, and the manifest with absolute paths in it.

    `cuts` are those of the recordings, in order, and `names` what a user calls these. Below a
    `where.root` that no state has, no file can be told. Raises ManifestError if none of the files
    was ever on the disks, FilesystemError if these cannot be read.
    """
    at_end = all(t.source.events == cut.position for t, cut in zip(timelines, cuts, strict=True))
    trees, manifest = at_the_end_or_there(
        lambda disks, others: locate_all(oracle, disks, manifest, where, others or (), names=names),
        [timeline.at(timeline.source.events) for timeline in timelines],
        None if at_end else [t.at(cut.position) for t, cut in zip(timelines, cuts, strict=True)],
    )
    return with_root(trees, timelines, manifest, where.root, oracle), manifest

"""Is the directory that --root names the guest's, or a mistake?

A directory that no state of the disk has is either wrong, or the guest never sent it. Which one
cannot be told, so nothing is said of the files below it. Looked at are the end, the instants after
some flushes, and what was there before the recording; in between it may have come and gone.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.oracle import Oracle

_LOOKED_AT = 17
"""So many earlier states, evenly spread, are looked at."""


def with_root(
    trees: Sequence[Tree],
    timelines: Sequence[Timeline],
    manifest: Manifest,
    root: str | None,
    oracle: Oracle,
) -> list[Tree]:
    """Return the trees of a guest's disks; with all files in doubt if no state has the root."""
    path = posixpath.normpath(f"/{(root or '').lstrip('/')}")
    if path == "/":
        return list(trees)
    places = [
        (timeline, mount)
        for timeline, tree in zip(timelines, trees, strict=True)
        if isinstance(mount := tree.of(path), Mount)
    ]
    if not places or any(_may_be_there(*place, path, oracle) for place in places):
        return list(trees)
    why = (
        f"no state that was looked at has a directory {path}: --root is wrong, or the guest never "
        f"sent it; if so, name one above it that is there, and the files from there"
    )
    doubtful = dict.fromkeys(manifest.paths(), why)
    return [replace(tree, doubtful={**doubtful, **tree.doubtful}) for tree in trees]


def _may_be_there(timeline: Timeline, mount: Mount, path: str, oracle: Oracle) -> bool:
    after = timeline.after_flushes(timeline.source.events)
    some = np.unique(np.linspace(0, len(after) - 1, _LOOKED_AT).astype(int))
    for position in [timeline.source.events, *(after[index] for index in some)]:
        try:
            with oracle.browse(timeline.at(position), mount=mount) as shown:
                try:
                    if shown.find(path.encode(errors="surrogateescape")) is not None:
                        return True
                except FilesystemError:
                    return True
        except FilesystemError:
            continue
    return False

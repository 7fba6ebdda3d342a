"""Places that files of a manifest may be at: which of them has the files is told by their content.

Two systems on one disk, a disk's clone, a backup beside the original: they have files of the same
names, and the right one may have fewer of them, as some were lost. Guarantees: a place is taken for
the right one only if no other has more than half as many files that are whole or look lost, or,
with a few files only, all the names as well; one without any whole file needs all the names. Where
no file is whole in any place, names are all there is to go by. Not covered: a whole copy of files
of which most are older, or cut short, where they belong, or are gone with all that was beside them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import Tree, above
from nbdproxy.oracles.oracle import Oracle
from nbdproxy.oracles.resolutions import Resolution, resolve, sole

_SURE = 3
"""So many more whole files show that of two places with the same names one is right."""

_LOST = {Condition.EMPTY, Condition.ZEROED, Condition.PARTLY_ZEROED, Condition.UNREADABLE}
"""What a file looks like that was lost, and no older one does."""


@dataclass(frozen=True, slots=True, eq=False)
class CandidateLocation:
    """Each disk's part of a tree, a manifest with its paths there, and how many of them exist."""

    trees: Sequence[Tree]
    manifest: Manifest
    count: int


def best(
    oracle: Oracle, devices: Sequence[ReadableDevice], places: Sequence[CandidateLocation]
) -> list[CandidateLocation]:
    """Return the place with most whole files, and those that may as well be the right one.

    Those with most of the names, if no file is whole in any; one place alone is not looked at.
    """
    if len(places) <= 1:
        return list(places)
    counted = [(*_count(oracle, devices, place), place) for place in places]
    most = max(whole for whole, _, _ in counted)
    names = max(place.count for whole, _, place in counted if whole == most)
    if not most:
        return [place for place in places if place.count == names]
    return [
        place
        for whole, lost, place in counted
        if ((whole + lost) * 2 > most and (whole or place.count >= names))
        or (place.count >= names and most - whole < _SURE)
    ]


def resolved_manifest(
    oracle: Oracle,
    devices: Sequence[ReadableDevice],
    trees: Sequence[Tree],
    manifest: Manifest,
    counted: Sequence[Resolution],
) -> Manifest:
    """Return the one of a manifest's resolutions in a tree; ManifestError if none is sure."""
    if not counted:
        return resolve(manifest, frozenset())
    places = {CandidateLocation(trees, one.manifest, one.count): one for one in counted}
    return sole([places[p] for p in best(oracle, devices, list(places))]).manifest


def _count(
    oracle: Oracle, devices: Sequence[ReadableDevice], place: CandidateLocation
) -> tuple[int, int]:
    """Return how many files are whole in a place, and how many others look lost there.

    Not those with other content, which may be older or another system's, and of those that are
    missing only the ones in or below a directory, not the top, that has a file which is whole.
    """
    counted: dict[str, Condition] = {}
    for device, tree in zip(devices, place.trees, strict=True):
        conditions = TreeCheck(oracle, place.manifest, {}, tree).check(device, None).conditions
        counted |= {path: what for path, what in conditions.items() if _of_tree(tree, path)}
    whole = [path for path, what in counted.items() if what is Condition.WHOLE]
    near = {folder for path in whole for folder in above(posixpath.dirname(path))} - {"/"}
    beside = {posixpath.dirname(path) for path in whole}
    missing = [path for path, what in counted.items() if what is Condition.MISSING]
    lost = [
        path
        for path in missing
        if posixpath.dirname(path) in beside or not near.isdisjoint(above(posixpath.dirname(path)))
    ]
    return len(whole), len(lost) + sum(what in _LOST for what in counted.values())


def _of_tree(tree: Tree, path: str) -> bool:
    return not isinstance(tree.of(path), str)

"""Ranks candidate locations of a manifest's files by how many of them are whole there.

Two systems on one disk, a clone, a backup beside the original: they have files of the same names,
and the right one may have fewer of them, as some were lost. Guarantees: a location is taken for the
right one only if no other has more than half as many files that are whole or look lost, or, with a
few files only, all the names as well; one without any whole file needs all the names. Where no file
is whole in any location, names alone decide. Not covered: a whole copy of files of which most are
older, or cut short, where they belong, or are gone with all that was beside them.
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
"""Of two locations with the same names, the one with this many more whole files is right."""

_LOST = {Condition.EMPTY, Condition.ZEROED, Condition.PARTLY_ZEROED, Condition.UNREADABLE}
"""Conditions that a crash leaves, and no older version of a file has."""


@dataclass(frozen=True, slots=True, eq=False)
class CandidateLocation:
    """Each disk's part of a tree, a manifest with its paths in it, and how many of these exist."""

    trees: Sequence[Tree]
    manifest: Manifest
    count: int


def best(
    oracle: Oracle, devices: Sequence[ReadableDevice], locations: Sequence[CandidateLocation]
) -> list[CandidateLocation]:
    """Return the location with most whole files, and all others that may be the right one.

    Those with most of the names, if no file is whole in any; a single one is returned unread.
    """
    if len(locations) <= 1:
        return list(locations)
    counted = [(*_count(oracle, devices, location), location) for location in locations]
    most = max(whole for whole, _, _ in counted)
    names = max(location.count for whole, _, location in counted if whole == most)
    if not most:
        return [location for location in locations if location.count == names]
    return [
        location
        for whole, lost, location in counted
        if ((whole + lost) * 2 > most and (whole or location.count >= names))
        or (location.count >= names and most - whole < _SURE)
    ]


def resolved_manifest(
    oracle: Oracle,
    devices: Sequence[ReadableDevice],
    trees: Sequence[Tree],
    manifest: Manifest,
    counted: Sequence[Resolution],
) -> Manifest:
    """Return the manifest by its best resolution in a tree; ManifestError if that is ambiguous."""
    if not counted:
        return resolve(manifest, frozenset())
    locations = {CandidateLocation(trees, one.manifest, one.count): one for one in counted}
    return sole([locations[p] for p in best(oracle, devices, list(locations))]).manifest


def _count(
    oracle: Oracle, devices: Sequence[ReadableDevice], location: CandidateLocation
) -> tuple[int, int]:
    """Return how many files are whole in a location, and how many others look lost there.

    Files with other content do not look lost: they may be older, or another system's. Missing files
    do if they are in a directory with a whole file, or below one other than the top.
    """
    counted: dict[str, Condition] = {}
    for device, tree in zip(devices, location.trees, strict=True):
        conditions = TreeCheck(oracle, location.manifest, {}, tree).check(device, None).conditions
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

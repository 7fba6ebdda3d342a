"""Places that files of a manifest may be at: which of them has the files is told by their content.

Two systems on one disk, a disk's clone, a backup beside the original: they have files of the same
names, and the right one may have fewer of them, as some were lost. Guarantees: a place is taken for
the right one only if no other has more than half as many whole files, or, with a few files only,
all the names as well. Where no file is whole in any place, names are all there is to go by. Not
covered: a copy of files of which most were lost where
they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles import manifest as manifests
from nbdproxy.oracles.composite import TreeFollower
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.manifest import Manifest, Resolution
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle

_SURE = 3
"""So many more whole files show that of two places with the same names one is right."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Each disk's part of a tree, a manifest with its paths there, and how many of them exist."""

    trees: Sequence[Tree]
    manifest: Manifest
    count: int


def best(oracle: Oracle, devices: Sequence[ReadableDevice], places: Sequence[Place]) -> list[Place]:
    """Return the place with most whole files, and those that may as well be the right one.

    Those with most of the names, if no file is whole in any; one place alone is not looked at.
    """
    if len(places) <= 1:
        return list(places)
    found: list[tuple[int, Place]] = []
    most = 0
    for place in sorted(places, key=lambda place: -place.count):
        if most and place.count * 2 <= most:
            break
        found.append((_whole(oracle, devices, place), place))
        most = max(most, found[-1][0])
    if not most:
        names = max(place.count for place in places)
        return [place for place in places if place.count == names]
    names = max(place.count for whole, place in found if whole == most)
    return [
        place
        for whole, place in found
        if whole * 2 > most or (place.count >= names and most - whole < _SURE)
    ]


def manifest_of(
    oracle: Oracle,
    devices: Sequence[ReadableDevice],
    trees: Sequence[Tree],
    manifest: Manifest,
    found: Sequence[Resolution],
) -> Manifest:
    """Return the one of a manifest's resolutions in a tree; ManifestError if none is sure."""
    if not found:
        return manifests.resolve(manifest, frozenset())
    places = {Place(trees, one.manifest, one.count): one for one in found}
    return manifests.sole([places[p] for p in best(oracle, devices, list(places))]).manifest


def _whole(oracle: Oracle, devices: Sequence[ReadableDevice], place: Place) -> int:
    """Return how many files are whole in a place."""
    found: set[str] = set()
    for device, tree in zip(devices, place.trees, strict=True):
        conditions = TreeFollower(oracle, place.manifest, {}, tree).check(device, None).conditions
        found |= {path for path, what in conditions.items() if what is Condition.WHOLE}
    return len(found)

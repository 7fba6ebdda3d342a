"""Resolves a manifest's paths against a filesystem that has some of its files.

They may be absolute, relative to some directory of it, or those of a guest that mounts it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from nbdproxy.errors import ManifestError
from nbdproxy.oracles.manifest import Entries, Manifest

RESOLUTIONS_MAX = 16
"""Resolutions that are compared."""
PAIRS = 200_000
"""Pairs of an entry and a file of its name that are looked at for proposals."""


def resolve(manifest: Manifest, paths: Collection[str]) -> Manifest:
    """Return the manifest with the absolute paths of a filesystem that has the files `paths`.

    Taken is the resolution under which most entries exist. Raises
    ManifestError if nothing matches anywhere, or if two places match equally well.
    """
    found = resolutions(manifest, paths)
    if not found:
        raise ManifestError(
            "the manifest matches nothing on this filesystem: "
            "if none of its files was ever there, say where they belong with --root PATH; "
            "else list what is there with `nbdproxy manifest` and name the files as it does"
        )
    most = max(one.count for one in found)
    return sole([one for one in found if one.count == most]).manifest


@dataclass(frozen=True, slots=True, eq=False)
class Resolution:
    """A manifest with one leading directory changed to another, and how many entries exist so.

    `front` is the directory that was taken off, `place` the one that stands instead: `/` if none
    does, and empty if nothing was changed.
    """

    place: str
    manifest: Manifest
    count: int
    front: str = ""


def resolutions(manifest: Manifest, paths: Collection[str]) -> list[Resolution]:
    """Return the changes of a leading directory under which entries exist, the best first.

    None at all, a directory put in front (`node_modules/a.js` is `/app/node_modules/a.js`), or one
    taken off (`/data/a.js`, named in a guest that mounts the filesystem at /data, is `/a.js`).
    Where an absolute path exists as it is, all stand as they are: others may be lost, and a copy of
    them elsewhere is not what was asked for.
    """
    known = paths if isinstance(paths, (set, frozenset)) else set(paths)
    if any(path.startswith("/") and path in known for path in manifest.paths()):
        return [_resolution(manifest, known, ("", ""))]
    found = [_resolution(manifest, known, change) for change in _proposals(manifest, known)]
    # Equally good ones are sorted by place, so that the order is always the same.
    return sorted(found, key=lambda one: (-one.count, one.place))[:RESOLUTIONS_MAX]


def sole(found: Sequence[Resolution]) -> Resolution:
    """Return the one of them, or that without any change; raises ManifestError for others."""
    if len(found) == 1:
        return found[0]
    for one in found:
        if one.place == "":
            return one
    places = ", ".join(sorted({one.place for one in found}))
    raise ManifestError(
        f"the manifest matches equally well under {places}; write its paths absolute, "
        f"as `nbdproxy manifest IMAGE` does"
    )


def _resolution(manifest: Manifest, known: Collection[str], change: tuple[str, str]) -> Resolution:
    moved = manifest
    if any(path != _moved(path, *change) for path in manifest.paths()):
        entries = (replace(e, path=_moved(e.path, *change)) for e in manifest.entries)
        moved = Manifest(Entries(entries))
    place = "" if change == ("", "") else change[1] or "/"
    count = sum(path in known for path in moved.paths())
    return Resolution(place, moved, count, change[0])


def _proposals(manifest: Manifest, known: Collection[str]) -> set[tuple[str, str]]:
    """Return the changes (old front, new front) under which at least one entry exists."""
    by_name: dict[str, list[str]] = {}
    for path in known:
        by_name.setdefault(path.rpartition("/")[2], []).append(path)
    common = os.path.commonpath(
        {"/" + path.strip("/").rpartition("/")[0] for path in manifest.paths()}
    )
    # Rare names propose few places, so they go first.
    found = [by_name.get(path.rpartition("/")[2], []) for path in manifest.paths()]
    order = sorted((len(places), i) for i, places in enumerate(found) if places)
    result = set()
    looked_at = 0
    for count, i in order:
        looked_at += count
        if looked_at > PAIRS:
            break
        for place in found[i]:
            old, new = _fronts(manifest.entries[i].path, place)
            if old == "" or (common + "/").startswith(old + "/"):
                result.add((old, new))
    return result


def _fronts(path: str, place: str) -> tuple[str, str]:
    """Cut what two paths have in common at their ends; both results are '' or start with '/'."""
    here, there = path.strip("/").split("/"), place.strip("/").split("/")
    while here and there and here[-1] == there[-1]:
        del here[-1], there[-1]
    return _join(here), _join(there)


def _join(parts: list[str]) -> str:
    return "".join("/" + part for part in parts)


def _moved(path: str, old: str, new: str) -> str:
    absolute = "/" + path.lstrip("/")
    return new + absolute.removeprefix(old)

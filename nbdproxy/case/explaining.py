"""Which files single questions are about: those of a manifest, or as they were in the end."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, UsageError
from nbdproxy.oracles.composite import scan
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.oracles.oracle import Oracle


def absolute(path: str) -> str:
    """Return a path as it is named in the guest: from its root, without detours."""
    return posixpath.normpath("/" + path.lstrip("/"))


def listed(manifest: Manifest, paths: Sequence[str]) -> Manifest:
    """Return the entries of some files, each once; UsageError for one that is not listed."""
    return _chosen(manifest, paths, "the manifest")


def as_in_the_end(
    disk: ReadableDevice, paths: Sequence[str], tree: Tree, oracle: Oracle
) -> Manifest:
    """Return entries for some files as a disk has them; UsageError for one that is not there."""
    found: list[Entry] = []
    for folder in dict.fromkeys(posixpath.dirname(absolute(path)) for path in paths):
        try:
            found += scan(oracle, disk, folder, tree).entries
        except FilesystemError as error:
            raise UsageError(
                f"what {folder} held in the end cannot be read ({error}); say what should be "
                f"there with --files MANIFEST"
            ) from None
    return _chosen(Manifest(tuple(found)), paths, "what was sent to the disk by the end")


def _chosen(manifest: Manifest, paths: Sequence[str], where: str) -> Manifest:
    known = {absolute(entry.path): entry for entry in manifest.entries}
    known |= {entry.path: entry for entry in manifest.entries}
    asked = list(dict.fromkeys(map(absolute, paths)))
    lost = [path for path in asked if path not in known]
    if lost:
        raise UsageError(
            f"{lost[0]} is not in {where}; its path has to be absolute in the filesystem, and one "
            f"that was never sent has to be in a --files MANIFEST"
        )
    return Manifest(tuple(known[path] for path in asked))

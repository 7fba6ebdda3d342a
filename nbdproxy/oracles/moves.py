"""Whether a manifest's files may belong in another directory than its paths say.

A manifest that was made in a guest names a data disk's files below the disk's mount point, and one
of relative paths leaves open where they begin. But a copy of lost files, in a backup, has the same
names and contents, and must not be taken for them. Guarantees: a change of the leading directory is
refused if the filesystem shows that the files were to be at their own paths, or at another mount
point: it is the root of a system, or has a directory that leads to them. Not covered: files that
were lost with all directories above them, and of which the only copy begins at the top of a
filesystem that is no system's root.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Sequence

from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import above
from nbdproxy.oracles.resolutions import Resolution

_BESIDE_ETC = ("/usr", "/bin", "/sbin", "/lib", "/proc", "/sys", "/dev")
"""Directories of a system's root beside /etc: file-hierarchy(7)."""

HasFolder = Callable[[str], bool]
"""Tells whether a filesystem has a directory, by its path from the top; true if not known."""


def is_system(has: HasFolder) -> bool:
    """Tell whether a filesystem is the root of a system."""
    return has("/etc") and any(has(one) for one in _BESIDE_ETC)


def may_show_at(has: HasFolder, point: str, files: Iterable[str]) -> bool:
    """Tell whether a filesystem may be mounted at a point.

    Not if it is a system's root, nor if it has a directory that it would have if it were mounted
    above: `/backup`, if files of `/mnt/backup` are to be at its top. `files` are those that it has
    by their paths from its top: of FAT, /EFI is no /efi that shows another mount point.
    """
    if point == "/":
        return True
    tops = {path.strip("/").split("/")[0] for path in files}
    other_case = {top.casefold() for top in tops} - tops
    names = (name for name in point.strip("/").split("/") if name not in other_case)
    return not is_system(has) and not any(has(f"/{name}") for name in names)


def fits(has: HasFolder, manifest: Manifest, found: Resolution) -> bool:
    """Tell whether a manifest's files may belong where a resolution puts them."""
    if found.place == "":
        return True
    if found.place == "/":
        paths = list(found.manifest.paths())
        return may_show_at(has, found.front or "/", paths)
    if found.front or any(path.startswith("/") for path in manifest.paths()):
        return False
    folder = _common(manifest)
    return folder == "/" or not has(folder)


def fitting(has: HasFolder, manifest: Manifest, found: Sequence[Resolution]) -> list[Resolution]:
    """Return the resolutions that `fits` allows."""
    return [one for one in found if fits(has, manifest, one)]


def own_folders(paths: Sequence[str], point: str) -> set[str]:
    """Return the directories below a mount point that lead to some files below it."""
    found: set[str] = set()
    for path in paths:
        for folder in above(posixpath.dirname(path)):
            if folder == point:
                break
            found.add(folder)
    return found


def _common(manifest: Manifest) -> str:
    """Return the directory that relative paths have in common, as it would be at the top."""
    folders = [posixpath.dirname(f"/{path.lstrip('/')}") for path in manifest.paths()]
    return os.path.commonpath(folders)

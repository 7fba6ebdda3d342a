"""Builds the lab: kernel, initramfs and tools disk, once, in a cache directory.

    lab = build_lab(progress=print)

Guarantees: needs no root; a second call finds everything in well under a second; what changed is
built anew, and only that (see `cache`). The kernel is kept until its part is deleted, even if
Debian has a newer one. The network is used the first time only: Debian's archive for the kernel,
the npm registry for the packages, each as the host is set up for them.

Does not cover hosts other than Debian 12 or 13 on amd64.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdproxy.errors import LabError
from nbdproxy.lab.guest import cpio, initramfs, kernel, tools, userland
from nbdproxy.lab.guest.cache import (
    LabCache,
    LabProgress,
    default_cache,
    identity_of,
    key_of,
    silent,
)

PROJECTS = {path.name: path for path in sorted((Path(__file__).parents[1] / "projects").iterdir())}
"""The npm projects that come with the package: `small` and `medium`."""

_NEEDED = (
    "apt-cache", "apt-get", "busybox", "dpkg-deb", "ldd", "mke2fs", "node", "perl",
    "qemu-system-x86_64", "sqlite3",
)  # fmt: skip
_EXTRA = (
    "btrfs", "dmsetup", "e2fsck", "fsck.fat", "lvm", "nbd-client", "ntfs-3g", "ntfs-3g.probe",
    "ntfsresize", "xfs_repair",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kit:
    """What boots: a kernel and an initramfs."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True, slots=True)
class Lab:
    """What a guest is made of.

    `manifests` has, for each project, the `sha256sum` file of what a whole run leaves on the
    target disk; its paths are absolute there. `programs` are those that only some runs need, and
    that the host had when the lab was built.
    """

    cache: Path
    kit: Kit
    tools_disk: Path
    manifests: Mapping[str, Path]
    programs: frozenset[str]


def build_lab(
    cache: Path | None = None,
    *,
    projects: Mapping[str, Path] = PROJECTS,
    progress: LabProgress = silent,
) -> Lab:
    """Return the lab, building what the cache does not have; `LabError` says what is missing.

    `projects` are directories with a package.json and a package-lock.json, by name.
    """
    if platform.machine() != "x86_64":
        raise LabError(
            f"the lab's guests are amd64, this host is {platform.machine()}; use another"
        )
    where = tools.require(_NEEDED)
    parts = LabCache((cache or default_cache()).resolve(), progress)
    with parts.locked():
        kit = _build_kit(parts, where["busybox"])
        npm_key = key_of(userland.NPM_VERSION)
        npm = parts.part("npm", npm_key, userland.fetch_npm, "lab: fetching npm")
        built = {name: _build_project(parts, name, projects[name], npm) for name in projects}
        # Few want these, so they are not among what is needed.
        extra = {name: found for name in _EXTRA if (found := tools.find(name))}
        programs = [where["perl"], where["sqlite3"], *extra.values()]
        disk = _build_disk(parts, where["node"], npm, built, programs)
    manifests = {name: part / "manifest.sha256" for name, part in built.items()}
    return Lab(parts.root, kit, disk / "tools.img", manifests, frozenset(extra))


def _build_kit(parts: LabCache, busybox: Path) -> Kit:
    groups = repr(kernel.GROUPS)
    debian = parts.part(
        "kernel",
        key_of(kernel.META_PACKAGE, groups),
        kernel.fetch,
        "lab: fetching Debian's cloud kernel (30 MB)",
    )

    def make(into: Path) -> None:
        (into / "initrd").write_bytes(initramfs.build(debian, busybox))

    key = key_of(debian.name, identity_of(busybox), _source_of(initramfs), _source_of(cpio))
    built = parts.part("initramfs", key, make, "lab: packing the initramfs")
    return Kit(debian / "vmlinuz", built / "initrd")


def _build_project(parts: LabCache, name: str, source: Path, npm: Path) -> Path:
    if not name.replace("-", "").isalnum():
        raise LabError(f"a project's name is letters, digits and dashes, not {name!r}; rename it")
    try:
        files = [(source / file).read_bytes() for file in ("package.json", "package-lock.json")]
    except OSError as error:
        raise LabError(
            f"project {name} cannot be read: {error}; run there: npm install --package-lock-only"
        ) from None
    return parts.part(
        f"project-{name}",
        key_of(npm.name, *files, *userland.NPM_FLAGS),
        lambda into: userland.fetch_project(into, source, npm),
        f"lab: installing project {name} from the npm registry",
    )


def _build_disk(
    parts: LabCache, node: Path, npm: Path, projects: Mapping[str, Path], programs: Sequence[Path]
) -> Path:
    key = key_of(
        identity_of(node),
        npm.name,
        *(f"{name} {part.name}" for name, part in projects.items()),
        *(identity_of(program) for program in programs),
        _source_of(userland),
    )
    return parts.part(
        "tools",
        key,
        lambda into: userland.make_tools_disk(into, npm, projects, programs),
        "lab: writing the tools disk (node, npm, packages, sqlite3)",
    )


def _source_of(module: object) -> bytes:
    """Return a module's source, so that changing how a part is made makes it anew."""
    return Path(str(getattr(module, "__file__", ""))).read_bytes()

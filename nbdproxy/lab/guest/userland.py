"""The tools disk: node and npm, projects whose packages are all cached, and other programs.

Guarantees: made without root; one pinned npm fills the cache on the host and runs in the guest, so
both agree on the cache's form and on what they install, and the manifest written here is what a
whole run in the guest leaves. Lockfiles fix every package by its digest.

Does not cover packages with install scripts: they are not run, neither here nor in the guest.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nbdproxy.errors import LabError
from nbdproxy.lab.guest import tools

NPM_VERSION = "10.9.4"  # the newest that still runs on Debian 12's node 18

NPM_FLAGS = (
    "--ignore-scripts",
    "--no-audit",
    "--no-fund",
    "--no-update-notifier",
    "--no-progress",
    "--no-color",
    "--no-omit-lockfile-registry-resolved",  # a user's setting would change an installed file
    "--logs-max=0",
)
"""What keeps npm from doing anything but installing; host and guest use the same."""

APP = "app"
"""The directory, at the top of the target disk, that workloads of a project fill."""

_BLOCK = 4096
_INODE = 256
_SPARE = 16 << 20  # bytes: room for the directories and the inode tables


def fetch_npm(into: Path) -> None:
    """Put npm's JavaScript tree into `into/npm`."""
    tools.run_tool([*tools.npm_command(), "pack", "--silent", f"npm@{NPM_VERSION}"], cwd=into)
    packed = into / f"npm-{NPM_VERSION}.tgz"
    with tarfile.open(packed) as archive:
        _extract(archive, into)
    (into / "package").rename(into / "npm")
    packed.unlink()


def fetch_project(into: Path, source: Path, npm: Path) -> None:
    """Install a project for real, and keep its npm cache, its files as a tar, and their digests.

    Leaves `cache/`, `tree.tar`, `manifest.sha256`, `package.json` and `package-lock.json`.
    """
    node = tools.require(["node"])["node"]
    app = into / APP
    app.mkdir()
    for name in ("package.json", "package-lock.json"):
        if not (source / name).is_file():
            raise LabError(f"{source} has no {name}; run there: npm install --package-lock-only")
    shutil.copyfile(source / "package.json", into / "package.json")
    lock = complete_lock((source / "package-lock.json").read_text(), _registry())
    (into / "package-lock.json").write_text(lock)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(into / name, app / name)
    cli = npm / "npm" / "bin" / "npm-cli.js"
    tools.run_tool([node, cli, "ci", "--cache", into / "cache", *NPM_FLAGS], cwd=app)
    # The guest reads the cache only; what npm keeps there beside it would be copied for nothing.
    for extra in ("_logs", "_update-notifier-last-checked", "_cacache/tmp"):
        path = into / "cache" / extra
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with (into / "manifest.sha256").open("w") as manifest:
        for path in files_below(app):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest.write(f"{digest}  /{path.relative_to(into).as_posix()}\n")
    with tarfile.open(into / "tree.tar", "w") as archive:
        archive.add(app, APP, filter=_owned_by_root)
    shutil.rmtree(app)


def complete_lock(text: str, registry: str) -> str:
    """Say in a lockfile where each package comes from; `npm ci --offline` finds nothing otherwise.

    The lockfiles here name no registry, so that whoever builds the lab uses their own.
    """
    lock = json.loads(text)
    for place, package in lock["packages"].items():
        if "integrity" in package:
            name = package.get("name") or place.rpartition("node_modules/")[2]
            file = f"{name.rpartition('/')[2]}-{package['version']}.tgz"
            package.setdefault("resolved", f"{registry.rstrip('/')}/{name}/-/{file}")
    return json.dumps(lock, indent=2) + "\n"


def _registry() -> str:
    return tools.run_tool([*tools.npm_command(), "config", "get", "registry"]).strip()


def files_below(root: Path) -> Iterator[Path]:
    """Yield the regular files below a directory, sorted; symbolic links are not followed."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path


def make_tools_disk(
    into: Path, npm: Path, projects: Mapping[str, Path], programs: Iterable[Path]
) -> None:
    """Write `tools.img`, an ext4 without a journal that any number of guests may share.

    `programs` are the host's own that the guest shall have in `/tools/bin`, beside node.
    """
    mke2fs = tools.require(["mke2fs"])["mke2fs"]
    root = into / "root"
    (root / "projects").mkdir(parents=True)
    (root / "bin").mkdir()
    for name in ("lib", "lib64", "usr"):
        (root / name).mkdir()
    _copy_node(root)
    for program in programs:
        _copy_program(root, program)
    shutil.copytree(npm / "npm", root / "npm", symlinks=True)
    for name, part in projects.items():
        shutil.copytree(part, root / "projects" / name, symlinks=True)
    count, total = _needed(root)
    blocks = (total + count * _INODE + total // 50 + _SPARE) // _BLOCK
    tools.run_tool(
        [
            mke2fs, "-F", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0",
            "-b", str(_BLOCK), "-I", str(_INODE), "-N", str(count + 64),
            "-E", "root_owner=0:0", "-d", root, into / "tools.img", str(blocks),
        ]
    )  # fmt: skip
    shutil.rmtree(root)


def _copy_node(root: Path) -> None:
    """Copy node, its libraries and the scripts that Debian keeps outside the binary."""
    for path in _copy_program(root, tools.require(["node"])["node"]):
        for found in set(re.findall(rb"/usr/share/nodejs/[\w./@-]+\.js", path.read_bytes())):
            script = Path(found.decode())
            if script.is_file():
                place = root / script.relative_to("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(script, place)


def _copy_program(root: Path, program: Path) -> list[Path]:
    """Copy a program, stripped, with its libraries, and link to it in `bin`; return them all."""
    real = program.resolve()
    ldd = tools.require(["ldd"])["ldd"]
    libraries = [Path(found) for found in re.findall(r"(/\S+) \(0x", tools.run_tool([ldd, real]))]
    for path in [real, *libraries]:
        place = root / path.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    strip = tools.find("strip")
    if strip is not None:
        tools.run_tool([strip, root / real.relative_to("/")])
    (root / "bin" / program.name).symlink_to(Path("/tools") / real.relative_to("/"))
    return [real, *libraries]


def _needed(root: Path) -> tuple[int, int]:
    """Return how many inodes and how many bytes of whole blocks a tree needs."""
    count = total = 0
    for path in root.rglob("*"):
        count += 1
        total += _BLOCK
        if path.is_file() and not path.is_symlink():
            total += path.stat().st_size
    return count, total


def _extract(archive: tarfile.TarFile, into: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extractall(into, filter="data")
    else:  # Python before 3.11.4, Debian 12 among them
        archive.extractall(into)


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member

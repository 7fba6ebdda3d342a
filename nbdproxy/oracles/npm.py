"""The files that `npm ci` leaves, from a lockfile and the packages' tarballs; nothing is installed.

Every tarball is checked against the lockfile's integrity before it is read. What npm does on the
way is done here too: the first folder of a tarball is dropped, links in it are ignored, a
`.gitignore` becomes `.npmignore`, a program's first line ends in a newline alone, and programs are
linked in `.bin`. Optional packages for other platforms are left out, with all that only they need.

Not covered: packages without integrity (git, folders), workspaces, install scripts, and
`node_modules/.package-lock.json`, which npm writes last.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import itertools
import json
import os
import platform
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbdproxy.errors import ManifestError
from nbdproxy.oracles.manifest import Entry, Manifest, digest, link_entry

ALGORITHMS = ("sha512", "sha384", "sha256", "sha1")
"""Of several digests the first of these counts."""

UNPACKED_MAX = 4 << 30
"""Bytes of a package's files; no package of npm's registry has as many."""

_CHUNK = 1 << 20
_NEEDS = ("dependencies", "devDependencies", "optionalDependencies", "peerDependencies")
_CPUS = {"x86_64": "x64", "aarch64": "arm64", "i686": "ia32", "armv7l": "arm"}
_SHEBANG = re.compile(rb"^(#![^\n]+)\r\n")


class Tarballs:
    """Where tarballs are: npm's cache, or a folder of .tgz files; found by their digests."""

    def __init__(self, *, cache: Path | None = None, folder: Path | None = None) -> None:
        self._content = None if cache is None else cache / "_cacache" / "content-v2"
        self._folder = folder
        self._known: dict[str, dict[str, Path]] = {}

    def find(self, name: str, algorithm: str, wanted: str) -> bytes:
        """Return the tarball of a package with a digest in hex.

        Raises ManifestError if there is none, or if what is there has another digest.
        """
        if self._folder is not None:
            path = self._in_folder(self._folder, algorithm).get(wanted)
            place = str(self._folder)
        else:
            assert self._content is not None
            path = self._content / algorithm / wanted[:2] / wanted[2:4] / wanted[4:]
            place = str(self._content.parent.parent)
        if path is None or not path.is_file():
            raise ManifestError(
                f"the tarball of {name} is not in {place}; fetch it with `npm cache add {name}`, "
                f"or name a folder of tarballs with --tarballs"
            )
        data = path.read_bytes()
        if hashlib.new(algorithm, data).hexdigest() != wanted:
            raise ManifestError(
                f"{path} is not the tarball of {name} that the lockfile names: its {algorithm} is "
                f"another; remove it and fetch it again"
            )
        return data

    def _in_folder(self, folder: Path, algorithm: str) -> dict[str, Path]:
        if algorithm not in self._known:
            if not folder.is_dir():
                raise ManifestError(f"there is no folder {folder}; name one of tarballs (.tgz)")
            self._known[algorithm] = {
                hashlib.new(algorithm, path.read_bytes()).hexdigest(): path
                for path in sorted(folder.iterdir())
                if path.is_file()
            }
        return self._known[algorithm]


def default_cache() -> Path:
    """Return where npm keeps its cache."""
    told = {name.lower(): value for name, value in os.environ.items()}
    return Path(told.get("npm_config_cache") or "~/.npm").expanduser()


def from_lock(lock: Path, tarballs: Tarballs, *, under: str = "", modes: bool = False) -> Manifest:
    """Describe what `npm ci` leaves beside a lockfile, named by its path below `under`.

    Raises ManifestError if the lockfile cannot be read, or a tarball is missing or another.
    """
    try:
        entries = _entries(lock, tarballs, modes=modes)
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ManifestError(
            f"{lock} is not as npm writes it; make it anew with: npm install --package-lock-only"
        ) from None
    front = under.rstrip("/") + "/" if under else ""
    return Manifest(
        tuple(
            Entry(front + path, e.digest, e.size, e.mode, e.target)
            for path, e in sorted(entries.items())
        )
    )


def _entries(lock: Path, tarballs: Tarballs, *, modes: bool) -> dict[str, Entry]:
    packages = _packages(lock)
    wanted = _reached(packages)
    entries = {}
    for path in (lock.with_name("package.json"), lock):
        if path.is_file():
            data = path.read_bytes()
            entries[path.name] = Entry(path.name, digest([data]), len(data))
    for place, package in packages.items():
        if not place or not _is_installed(place, package):
            continue
        if (package.get("optional") or package.get("devOptional")) and place not in wanted:
            continue  # only packages need it that are not for this platform
        name = package.get("name") or place.rpartition("node_modules/")[2]
        label = f"{name}@{package.get('version', '')}"
        data = tarballs.find(label, *_strongest(package.get("integrity"), label))
        programs = _programs(place, package)
        for entry in _unpacked(data, place, label, set(programs.values()), modes=modes):
            entries[entry.path] = entry
        for link, program in programs.items():
            target = posixpath.relpath(program, posixpath.dirname(link))
            entries.setdefault(link, link_entry(link, target))
    return entries


def _packages(lock: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(lock.read_text("utf-8-sig"))
    except OSError as error:
        raise ManifestError(f"{lock}: {error.strerror}; name a package-lock.json") from error
    except ValueError as error:
        raise ManifestError(f"{lock} is no lockfile ({error}); name a package-lock.json") from None
    packages = content.get("packages") if isinstance(content, dict) else None
    if not isinstance(packages, dict):
        raise ManifestError(
            f"{lock} is no lockfile of version 2 or 3; "
            f"make one with: npm install --package-lock-only"
        )
    return packages


def _is_installed(place: str, package: Mapping[str, Any]) -> bool:
    """Tell whether npm unpacks a tarball for this entry, on this platform."""
    if package.get("link") or package.get("inBundle") or "node_modules/" not in place:
        return False
    return not package.get("optional") or _is_for_this_platform(package)


def _is_for_this_platform(package: Mapping[str, Any]) -> bool:
    machine = os.uname().machine
    return (
        _admits(package.get("os"), "linux")
        and _admits(package.get("cpu"), _CPUS.get(machine, machine))
        and _admits(package.get("libc"), "glibc" if platform.libc_ver()[0] == "glibc" else "musl")
    )


def _reached(packages: Mapping[str, Any]) -> set[str]:
    """Return the places that the project needs, by way of packages for this platform."""
    found, todo = {""}, [""]
    while todo:
        place = todo.pop()
        package = packages.get(place, {})
        if package.get("optional") and not _is_for_this_platform(package):
            continue
        names = [name for kind in _NEEDS for name in package.get(kind) or {}]
        places = [package["resolved"]] if package.get("link") else []
        places += [at for name in names if (at := _resolved(packages, place, name)) is not None]
        todo += [at for at in places if at not in found]
        found.update(places)
    return found


def _resolved(packages: Mapping[str, Any], place: str, name: str) -> str | None:
    """Return where a package finds another: below itself, or below a folder above it."""
    while True:
        at = f"{place}/node_modules/{name}".removeprefix("/")
        if at in packages:
            return at
        if not place:
            return None
        place = place.rpartition("node_modules/")[0].rstrip("/")


def _admits(listed: Sequence[str] | None, own: str) -> bool:
    if not listed:
        return True
    refused = {word[1:] for word in listed if word.startswith("!")}
    wanted = {word for word in listed if not word.startswith("!")}
    return own not in refused and (not wanted or own in wanted)


def _strongest(integrity: str | None, name: str) -> tuple[str, str]:
    """Return the algorithm and the digest in hex of an integrity string."""
    known = dict(word.split("-", 1) for word in (integrity or "").split() if "-" in word)
    for algorithm in ALGORITHMS:
        if algorithm in known:
            try:
                wanted = base64.b64decode(known[algorithm].partition("?")[0], validate=True)
            except ValueError:
                break
            return algorithm, wanted.hex()
    raise ManifestError(
        f"the lockfile has no integrity for {name}, so its files cannot be known; "
        f"list them where it is installed, with `nbdproxy manifest DIR`"
    )


def _programs(place: str, package: Mapping[str, Any]) -> dict[str, str]:
    """Return the links in `.bin` and the programs that they lead to."""
    found = package.get("bin") or {}
    if isinstance(found, str):
        found = {place.rpartition("/")[2]: found}
    front = place.rpartition("node_modules/")[0] + "node_modules/.bin/"
    return {
        front + name.rpartition("/")[2]: posixpath.normpath(posixpath.join(place, path))
        for name, path in found.items()
    }


def _unpacked(
    data: bytes, place: str, name: str, programs: set[str], *, modes: bool
) -> Iterator[Entry]:
    ignored = set()
    unpacked = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                unpacked += member.size
                if unpacked > UNPACKED_MAX or member.issparse():
                    raise ManifestError(
                        f"the tarball of {name} is none that npm would take: it has sparse files, "
                        f"or more than {UNPACKED_MAX >> 30} GiB; list what it leaves with "
                        f"`nbdproxy manifest DIR`"
                    )
                path = member.name.removeprefix("./").partition("/")[2]
                if posixpath.basename(path) == ".npmignore":
                    ignored.add(path)
                elif posixpath.basename(path) == ".gitignore":
                    path = path.removesuffix(".gitignore") + ".npmignore"
                    if path in ignored:
                        continue
                stream = archive.extractfile(member)
                assert stream is not None
                full = posixpath.normpath(posixpath.join(place, path))
                if not full.startswith(f"{place}/"):
                    raise ManifestError(f"the tarball of {name} has a file outside of its folder")
                first = stream.read(_CHUNK)
                if full in programs:
                    first = _SHEBANG.sub(rb"\1\n", first)
                rest = iter(functools.partial(stream.read, _CHUNK), b"")
                mode = None
                if modes:
                    mode = 0o755 if full in programs else (member.mode | 0o666) & 0o777 & ~0o022
                size = member.size - min(member.size, _CHUNK) + len(first)
                yield Entry(full, digest(itertools.chain([first], rest)), size, mode)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ManifestError(f"the tarball of {name} cannot be read: {error}") from error

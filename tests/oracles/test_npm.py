"""What npm ci would leave, from tarballs; the lab's real installs are compared in tests/lab."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.errors import ManifestError
from nbdproxy.oracles.manifest import Entry, digest
from nbdproxy.oracles.npm import Tarballs, default_cache, from_lock


def tarball(files: Mapping[str, bytes], *, mode: int = 0o600, link: bool = False) -> bytes:
    """A package as npm packs it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo("package/link")
            member.type, member.linkname = tarfile.SYMTYPE, "index.js"
            archive.addfile(member)
    return out.getvalue()


def integrity(data: bytes, algorithm: str = "sha512") -> str:
    """As a lockfile writes it."""
    raw = hashlib.new(algorithm, data).digest()
    return f"{algorithm}-{base64.b64encode(raw).decode()}"


class Project:
    """A lockfile, and a folder with the tarballs that it names."""

    def __init__(self, folder: Path) -> None:
        self.tarballs = folder / "tarballs"
        self.tarballs.mkdir()
        self.lock = folder / "package-lock.json"
        self.packages: dict[str, dict[str, Any]] = {"": {}}

    def add(self, place: str, data: bytes, **more: Any) -> None:
        """Install a package there."""
        (self.tarballs / f"{len(self.packages)}.tgz").write_bytes(data)
        self.packages[place] = {"version": "1.0.0", "integrity": integrity(data), **more}

    def entries(self, **options: Any) -> dict[str, Entry]:
        """What would be installed, without the project's own files."""
        self.lock.write_text(json.dumps({"lockfileVersion": 3, "packages": self.packages}))
        found = from_lock(self.lock, Tarballs(folder=self.tarballs), **options)
        return {e.path: e for e in found.entries if not e.path.endswith("package-lock.json")}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_files_programs_and_their_links(project: Project) -> None:
    files = {"cli.js": b"#!/usr/bin/env node\r\nx\r\n", "index.js": b"1", ".gitignore": b"*"}
    project.add("node_modules/@s/tool", tarball(files, link=True), bin={"tool": "./cli.js"})
    project.add("node_modules/a/node_modules/b", tarball({"b.js": b"2"}), bin="b.js")
    found = project.entries(under="/app", modes=True)
    assert {path: entry.mode for path, entry in found.items() if entry.target is None} == {
        "/app/node_modules/@s/tool/cli.js": 0o755,
        "/app/node_modules/@s/tool/index.js": 0o644,
        "/app/node_modules/@s/tool/.npmignore": 0o644,
        "/app/node_modules/a/node_modules/b/b.js": 0o755,
    }
    assert {path: entry.target for path, entry in found.items() if entry.target is not None} == {
        "/app/node_modules/.bin/tool": "../@s/tool/cli.js",
        "/app/node_modules/a/node_modules/.bin/b": "../b/b.js",
    }
    program = found["/app/node_modules/@s/tool/cli.js"]
    assert program.digest == digest([b"#!/usr/bin/env node\nx\r\n"])


def test_what_is_not_unpacked(project: Project) -> None:
    data = tarball({"index.js": b"1"})
    project.packages[""] = {"optionalDependencies": {"here": "1", "other-os": "1", "other-cpu": ""}}
    project.add("node_modules/here", data, optional=True, os=["!win32"], cpu=[])
    project.add("node_modules/other-os", data, optional=True, os=["darwin"])
    project.add("node_modules/other-cpu", data, optional=True, cpu=["!x64", "!arm64"])
    project.add("node_modules/bundled", data, inBundle=True)
    project.packages["node_modules/workspace"] = {"link": True, "resolved": "packages/w"}
    project.packages["packages/w"] = {"version": "1.0.0"}
    assert list(project.entries()) == ["node_modules/here/index.js"]


def test_a_tarball_that_is_missing_or_another_is_never_used(project: Project) -> None:
    data = tarball({"index.js": b"1"})
    project.add("node_modules/a", data)
    [path] = project.tarballs.iterdir()
    path.write_bytes(data + b"?")
    with pytest.raises(
        ManifestError, match=r"tarball of a@1.0.0 is not in .*npm cache add a@1.0.0"
    ):
        project.entries()
    wanted = hashlib.sha512(data).hexdigest()
    place = project.tarballs / "_cacache/content-v2/sha512" / wanted[:2] / wanted[2:4]
    place.mkdir(parents=True)
    cached = place / wanted[4:]
    cached.write_bytes(data)
    cache = Tarballs(cache=project.tarballs)
    assert "node_modules/a/index.js" in {e.path for e in from_lock(project.lock, cache).entries}
    cached.write_bytes(data + b"?")
    with pytest.raises(
        ManifestError, match=r"is not the tarball of a@1.0.0 that the lockfile names"
    ):
        from_lock(project.lock, cache)


def test_the_strongest_digest_counts(project: Project) -> None:
    data = tarball({"index.js": b"1"})
    both = f"sha1-{'A' * 27}= {integrity(data)}"
    project.add("node_modules/a", data)
    project.packages["node_modules/a"]["integrity"] = both
    assert list(project.entries()) == ["node_modules/a/index.js"]
    project.packages["node_modules/a"]["integrity"] = integrity(data, "sha1")
    assert list(project.entries()) == ["node_modules/a/index.js"]
    project.packages["node_modules/a"]["integrity"] = ""
    with pytest.raises(ManifestError, match=r"no integrity for a@1.0.0"):
        project.entries()


def test_a_lockfile_may_begin_with_a_byte_order_mark(project: Project) -> None:
    project.add("node_modules/a", tarball({"index.js": b"x"}))
    found = project.entries()
    project.lock.write_bytes(b"\xef\xbb\xbf" + project.lock.read_bytes())
    again = from_lock(project.lock, Tarballs(folder=project.tarballs)).entries
    assert {entry.path for entry in again} > set(found) > set()


def test_what_is_no_lockfile(tmp_path: Path, project: Project) -> None:
    tarballs = Tarballs(folder=tmp_path)
    lock = tmp_path / "x.json"
    with pytest.raises(ManifestError, match="No such file"):
        from_lock(lock, tarballs)
    lock.write_text("{")
    with pytest.raises(ManifestError, match="no lockfile"):
        from_lock(lock, tarballs)
    lock.write_text('{"lockfileVersion": 1, "dependencies": {}}')
    with pytest.raises(ManifestError, match="npm install --package-lock-only"):
        from_lock(lock, tarballs)
    project.add("node_modules/a", b"no tarball")
    with pytest.raises(ManifestError, match=r"the tarball of a@1.0.0 cannot be read"):
        project.entries()


@pytest.mark.parametrize(
    "more",
    [{"integrity": 5}, {"integrity": "sha512-é"}, {"os": 3, "optional": True}, {"bin": [1]},
     {"bin": {"x": 1}}],
)  # fmt: skip
def test_what_npm_would_not_write(project: Project, more: dict[str, Any]) -> None:
    project.add("node_modules/a", tarball({"index.js": b""}), **more)
    with pytest.raises(ManifestError):
        project.entries()
    project.packages["node_modules/a"] = 5  # type: ignore[assignment]
    with pytest.raises(ManifestError, match="not as npm writes it"):
        project.entries()


def test_a_tarball_with_a_broken_stream(project: Project) -> None:
    data = bytearray(tarball({"index.js": b"x" * 4096}))
    data[30] ^= 0xFF
    project.add("node_modules/a", bytes(data))
    with pytest.raises(ManifestError, match="cannot be read"):
        project.entries()


def test_npm_s_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("npm_config_cache", raising=False)
    assert default_cache() == Path("/home/me/.npm")
    monkeypatch.setenv("npm_config_cache", "/cache")
    assert default_cache() == Path("/cache")


def test_what_only_packages_for_other_platforms_need(project: Project) -> None:
    """As sharp: one package for each platform and C library, some with needs of their own."""
    data = tarball({"index.js": b"1"})
    project.packages[""] = {"dependencies": {"image": "1"}}
    parts = {"image-gnu": "1", "image-musl": "1", "image-wasm": "1"}
    project.add("node_modules/image", data, optionalDependencies=parts)
    needs = {"dependencies": {"runtime": "1", "shared": "1"}}
    project.add("node_modules/image-gnu", data, optional=True, os=["linux"], libc=["glibc"],
                dependencies={"shared": "1"})  # fmt: skip
    project.add("node_modules/image-musl", data, optional=True, os=["linux"], libc=["musl"])
    project.add("node_modules/image-wasm", data, optional=True, cpu=["wasm32"], **needs)
    project.add("node_modules/image-wasm/node_modules/runtime", data, optional=True)
    project.add("node_modules/runtime", data, optional=True)
    project.add("node_modules/shared", data, optional=True)
    assert {path.split("/")[1] for path in project.entries()} == {"image", "image-gnu", "shared"}


def test_tarballs_that_nobody_should_unpack(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add("node_modules/a", tarball({"x/../../../../etc/passwd": b"1"}))
    with pytest.raises(ManifestError, match="outside"):
        project.entries()
    project.packages.clear()
    project.add("node_modules/a", tarball({"one": bytes(3 << 20), "two": b"2"}))
    assert project.entries()["node_modules/a/one"].digest == digest([bytes(3 << 20)])
    monkeypatch.setattr("nbdproxy.oracles.npm.UNPACKED_MAX", 3 << 20)
    with pytest.raises(ManifestError, match="none that npm would take"):
        project.entries()

"""The oracle as a whole: every condition on a real filesystem, and never a false verdict."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.extents import Extent
from nbdproxy.oracles import check as oracle
from nbdproxy.oracles.check import Findings, Verdict, check, merge, paths, scan
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.incremental_check import IncrementalCheck
from nbdproxy.oracles.locate import locate
from nbdproxy.oracles.manifest import (
    Entry,
    Manifest,
    dump,
    from_directory,
    link_entry,
)
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.quick import QUICK
from nbdproxy.oracles.resolutions import resolve
from tests.support import conditions

Run = Callable[..., str]
Make = Callable[..., Path]
Debugfs = Callable[[Path, Sequence[str]], str]
Load = Callable[[Path], MemoryDisk]

MIB = 1 << 20
CONTENT = bytes(range(1, 251)) * 80  # 20,000 bytes without a zero
NAMES = ["whole", "missing", "empty", "zeroed", "partly-zeroed", "short", "stale", "damaged"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "app/node_modules").mkdir(parents=True)
    for name in NAMES:
        (root / "app/node_modules" / name).write_bytes(CONTENT)
    (root / "app/link").symlink_to("node_modules/whole")
    os.link(root / "app/node_modules/whole", root / "app/hard")
    return root


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return from_directory(folder / "app/node_modules", under="/app/node_modules")


@pytest.fixture
def image(make_image: Make, folder: Path) -> Path:
    return make_image("-t", "ext4", "-b", "4096", folder=folder)


def test_a_good_filesystem_passes(image: Path, load: Load, manifest: Manifest) -> None:
    findings = check(load(image), manifest)
    assert findings == Findings(
        Verdict.PASS, {f"/app/node_modules/{name}": Condition.WHOLE for name in NAMES}, None
    )


def test_every_condition_shows_on_a_real_filesystem(tmp_path: Path, load: Load) -> None:
    shown = conditions.make(tmp_path)
    findings = check(load(shown.image), shown.manifest, earlier=shown.earlier)
    assert findings == Findings(Verdict.FAIL, shown.expected)
    followed = IncrementalCheck(shown.manifest, earlier=shown.earlier)
    assert followed.check(load(shown.image), None) == findings


def test_what_is_no_regular_file_is_damaged_and_links_are_followed(
    image: Path, load: Load, manifest: Manifest
) -> None:
    entry = manifest.entries[0]
    disk = load(image)
    named = Manifest(tuple(replace(entry, path=path) for path in ("/app", "/app/link")))
    assert check(disk, named).conditions == {
        "/app": Condition.DAMAGED,
        "/app/link": Condition.WHOLE,
    }


def test_links_and_modes(image: Path, debugfs: Debugfs, load: Load) -> None:
    """A link by its target and a mode by its bits; only a short target is in the inode."""
    long = "x" * 100
    debugfs(image, [f"symlink /app/long {long}", "set_inode_field /app/hard mode 0100754"])
    disk = load(image)
    assert {e.target for e in scan(disk).entries} == {None, "node_modules/whole", long}
    content = hashlib.sha256(CONTENT).hexdigest()
    wanted = {
        link_entry("/app/link", "node_modules/whole"): Condition.WHOLE,
        link_entry("/app/long", long): Condition.WHOLE,
        link_entry("/app/node_modules/whole", "x"): Condition.DAMAGED,
        link_entry("/app/nowhere", "x"): Condition.MISSING,
        Entry("/app/hard", content, 20000, mode=0o754): Condition.WHOLE,
        Entry("/app/node_modules/short", content, 20000, mode=0o777): Condition.DAMAGED,
    }
    others = {
        link_entry("/app/link", "node_modules/other"): Condition.DAMAGED,
        link_entry("/app/long", long + "x"): Condition.SHORT,
    }
    for expected in (wanted, others):
        manifest = Manifest(tuple(expected))
        conditions = {entry.path: condition for entry, condition in expected.items()}
        assert check(disk, manifest).conditions == conditions
        follower = IncrementalCheck(manifest)
        assert follower.check(disk, None).conditions == conditions
    node = Filesystem(disk).lookup(b"/app/link", follow_last=False)
    assert node is not None
    follower = IncrementalCheck(Manifest(tuple(wanted)))
    follower.check(disk, None)
    at = Filesystem(disk).inode_offset(node.number)
    disk.pwrite(at, load(image).pread(Filesystem(disk).inode_offset(2), 256))
    changed = follower.check(disk, [Extent(at, 256)])
    assert changed.conditions["/app/link"] is not Condition.WHOLE


def test_relative_manifests_are_resolved(image: Path, load: Load, folder: Path) -> None:
    relative = from_directory(folder / "app")
    disk = load(image)
    findings = check(disk, relative)
    assert findings.verdict is Verdict.PASS
    assert next(iter(findings.conditions)) == "/app/hard"
    assert resolve(relative, paths(disk)) == from_directory(folder / "app", under="/app")
    with pytest.raises(ManifestError, match="matches nothing"):
        check(disk, Manifest((Entry("node_modules/nowhere", "a" * 64, 1),)))


def test_scan_describes_what_is_there(image: Path, load: Load, folder: Path) -> None:
    disk = load(image)
    assert set(scan(disk).entries) == set(from_directory(folder, under="/").entries)
    assert [e.path for e in scan(disk, "/app/hard").entries] == ["/app/hard"]
    below = {e.path for e in scan(disk, "/app/node_modules").entries}
    assert below == {f"/app/node_modules/{name}" for name in NAMES}
    assert scan(disk, "/nowhere").entries == ()
    assert set(paths(disk)) == below | {"/app/hard", "/app/link"}


def test_the_manifest_of_a_scan_satisfies_sha256sum(image: Path, load: Load, folder: Path) -> None:
    text = dump(scan(load(image))).replace("  /", "  ./")
    subprocess.run(["sha256sum", "-c", "--strict"], input=text.encode(), cwd=folder, check=True)


def test_scan_names_the_file_it_cannot_read(image: Path, load: Load) -> None:
    disk = load(image)
    filesystem = Filesystem(disk)
    node = filesystem.lookup(b"/app/node_modules/short")
    assert node is not None
    disk.pwrite(filesystem.inode_offset(node.number) + 4, b"\xff")
    with pytest.raises(FilesystemError, match="/app/node_modules/short"):
        scan(disk)


def test_no_filesystem_is_unknown(manifest: Manifest) -> None:
    for size in (0, 512, MIB):
        findings = check(MemoryDisk(size), manifest)
        assert findings.verdict is Verdict.UNKNOWN
        assert not findings.conditions
        assert findings.reason is not None and "no filesystem found" in findings.reason
        with pytest.raises(FilesystemError, match="no filesystem found"):
            scan(MemoryDisk(size))


def test_a_refused_filesystem_is_unknown(image: Path, load: Load, manifest: Manifest) -> None:
    disk = load(image)
    disk.pwrite(1024 + 0x78, b"label")
    findings = check(disk, manifest)
    assert findings.verdict is Verdict.UNKNOWN
    assert not findings.conditions
    assert findings.reason is not None and "refuse to mount" in findings.reason


def test_an_encrypted_file_is_unknown_unless_another_fails(
    make_image: Make, debugfs: Debugfs, load: Load, folder: Path, manifest: Manifest
) -> None:
    image = make_image("-t", "ext4", "-O", "encrypt", folder=folder)
    debugfs(image, ["set_inode_field /app/node_modules/short flags 0x80800"])
    findings = check(load(image), manifest)
    assert findings.verdict is Verdict.UNKNOWN
    assert findings.conditions["/app/node_modules/short"] is Condition.CANNOT_BE_TOLD
    assert findings.conditions["/app/node_modules/whole"] is Condition.WHOLE
    assert findings.reason is not None and "key" in findings.reason
    debugfs(image, ["rm /app/node_modules/whole"])
    assert check(load(image), manifest).verdict is Verdict.FAIL


def test_a_crashed_oracle_is_unknown(
    image: Path, load: Load, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(oracle, "classify", crash)
    findings = check(load(image), manifest)
    assert findings.verdict is Verdict.UNKNOWN
    assert not findings.conditions
    assert findings.reason is not None and "a bug" in findings.reason


def test_a_huge_hole_is_not_read_without_end(
    image: Path, debugfs: Debugfs, load: Load, manifest: Manifest
) -> None:
    debugfs(image, ["set_inode_field /app/node_modules/whole size 0x40000000000"])
    assert check(load(image), manifest).verdict is Verdict.FAIL
    unknown = Manifest(tuple(replace(entry, size=None) for entry in manifest.entries))
    findings = check(load(image), unknown)
    assert findings.verdict is Verdict.UNKNOWN
    assert findings.reason is not None and "size" in findings.reason


def test_verdicts_merge() -> None:
    assert merge([]) is Verdict.PASS
    assert merge([Verdict.PASS, Verdict.UNKNOWN]) is Verdict.UNKNOWN
    assert merge([Verdict.UNKNOWN, Verdict.FAIL, Verdict.PASS]) is Verdict.FAIL


@pytest.fixture
def partitioned(run: Run, make_image: Make, folder: Path, tmp_path: Path) -> MemoryDisk:
    """Three partitions: a small filesystem with other files, the manifest's, and none."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "boot").write_bytes(b"boot")
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    run("truncate", "-s", str(40 * MIB), disk)
    table = "label: gpt\nstart=1MiB, size=8MiB\nstart=9MiB, size=16MiB\nstart=25MiB, size=8MiB\n"
    run("sfdisk", "--quiet", disk, stdin=table)
    result = MemoryDisk(disk.read_bytes())
    small = make_image("-t", "ext4", folder=other, size="8M", name="small")
    result.pwrite(MIB, small.read_bytes())
    result.pwrite(9 * MIB, make_image("-t", "ext4", folder=folder, name="large").read_bytes())
    return result


def test_the_partition_with_the_files_is_found(
    partitioned: MemoryDisk, manifest: Manifest, folder: Path
) -> None:
    found = locate(QUICK, partitioned, from_directory(folder / "app/node_modules"))
    assert found == (Tree((Mount(partition=2),)), manifest)
    assert check(partitioned, manifest, mount=Mount(partition=2)).verdict is Verdict.PASS
    assert check(partitioned, manifest, mount=Mount(partition=1)).verdict is Verdict.FAIL
    assert check(partitioned, manifest, mount=Mount(partition=3)).verdict is Verdict.UNKNOWN
    findings = check(partitioned, manifest, mount=Mount(partition=7))
    assert findings.reason == "there is no partition 7; choose one of 0, 1, 2, 3"


def test_several_filesystems_need_a_choice(partitioned: MemoryDisk) -> None:
    with pytest.raises(FilesystemError, match=r"1 \(partition 1, .*2 \(partition 2, "):
        scan(partitioned)
    assert [e.path for e in scan(partitioned, mount=Mount(partition=1)).entries] == ["/boot"]
    assert paths(partitioned, mount=Mount(partition=1)) == ["/boot"]
    nowhere = Manifest((Entry("/nowhere", "a" * 64, 1),))
    findings = check(partitioned, nowhere)
    assert findings.verdict is Verdict.UNKNOWN
    assert findings.reason is not None and "several partitions hold" in findings.reason
    with pytest.raises(ManifestError):
        locate(QUICK, partitioned, nowhere)


def test_a_large_project_is_checked_in_well_under_a_second(
    make_image: Make, load: Load, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    for i in range(3262):
        path = root / f"node_modules/p{i // 20}/lib/f{i}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % i * 1300)
    disk = load(make_image("-t", "ext4", folder=root, size="64M"))
    manifest = from_directory(root, under="/")
    start = time.process_time()
    findings = check(disk, manifest)
    taken_s = time.process_time() - start
    assert findings.verdict is Verdict.PASS
    assert len(findings.conditions) == 3262
    assert taken_s < 1.0

"""Btrfs subvolumes: what a guest's mounts show of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdproxy.checker.oracle import SNAPSHOTS_MAX, KernelOracle, chosen
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import locate
from nbdproxy.oracles.manifest import Manifest
from nbdproxy.oracles.mounts import ONLY, Mount
from tests.support.states import cut_off, files

MAKE = """
export PATH=/tools/bin:$PATH; b='btrfs subvolume'
$b create @; $b create @home; $b create @/var; $b create 'a
b'
mkdir @/etc @home/u; ln -s /home/u @/u
echo p > @/etc/passwd; echo 1 > @home/u/1.js; echo v > @/var/v
$b snapshot @ before; echo new > @/etc/passwd; echo t > top; sync
"""
ROOT_FILES: dict[str, bytes] = {"etc/passwd": b"new\n", "var/v": b"v\n"}
HOME_FILES: dict[str, bytes] = {"home/u/1.js": b"1\n"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("btrfs") / "image"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", path], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def disk(kernel: KernelOracle, image: Path) -> OverlayDisk:
    """One with subvolumes, nested ones and a snapshot; the default is still the top level."""
    return cut_off(kernel, image, MAKE)


def judged(
    kernel: KernelOracle, disk: OverlayDisk, wanted: Manifest, mount: Mount
) -> set[Condition]:
    found = kernel.prepare_check(wanted, earlier={}, mount=mount).check(disk, None)
    assert found.conditions, found.reason
    return set(found.conditions.values())


@pytest.mark.lab
def test_files_are_where_the_guest_s_mounts_put_them(
    kernel: KernelOracle, disk: OverlayDisk
) -> None:
    root = Mount(root="/@", covered=("/home",))
    home = Mount("/home", root="/@home")
    assert judged(kernel, disk, files(**ROOT_FILES), root) == {Condition.WHOLE}
    assert judged(kernel, disk, files(**HOME_FILES), home) == {Condition.WHOLE}
    assert judged(kernel, disk, files(**HOME_FILES), Mount(root="/@")) == {Condition.MISSING}
    assert kernel.paths(disk, mount=home) == ["/home/u/1.js"]
    assert kernel.paths(disk, mount=root) == ["/etc/passwd", "/u", "/var/v"]


@pytest.mark.lab
def test_a_snapshot_has_what_was_there_and_nothing_of_nested_subvolumes(
    kernel: KernelOracle, disk: OverlayDisk
) -> None:
    snapshot = Mount(root="/before")
    assert judged(kernel, disk, files(**{"etc/passwd": b"p\n"}), snapshot) == {Condition.WHOLE}
    assert judged(kernel, disk, files(**{"var/v": b"v\n"}), snapshot) == {Condition.MISSING}


@pytest.mark.lab
def test_a_mount_without_options_shows_the_default_subvolume(
    kernel: KernelOracle, disk: OverlayDisk, tmp_path: Path
) -> None:
    others = ("/@", "/@/var", "/@home", "/a\\nb", "/before")
    shown = tuple(path.replace("\\n", "\n") for path in others)
    assert judged(kernel, disk, files(top=b"t\n"), ONLY) == {Condition.WHOLE}
    assert kernel.roots(disk, None) == ("/", *shown)
    assert {"/top", "/@/var/v", "/before/etc/passwd"} < set(
        kernel.paths(disk, mount=Mount(root="/"))
    )

    image = tmp_path / "image"
    image.write_bytes(disk.pread(0, disk.size))
    script = "/tools/bin/btrfs subvolume set-default @; sync"
    changed = cut_off(kernel, image, script)
    assert judged(kernel, changed, files(**ROOT_FILES), ONLY) == {Condition.WHOLE}
    assert judged(kernel, changed, files(top=b"t\n"), ONLY) == {Condition.MISSING}
    assert judged(kernel, changed, files(top=b"t\n"), Mount(root="/")) == {Condition.WHOLE}
    assert kernel.roots(changed, None) == ("/@", "/", *shown[1:])
    tree, resolved = locate(kernel, changed, files(**ROOT_FILES))
    assert [mount.root for mount in tree.mounts] == ["/@"]
    assert resolved == files(**ROOT_FILES)
    # What came later in the guest's life was another disk with the same name: it is forgotten.
    assert judged(kernel, disk, files(top=b"t\n"), ONLY) == {Condition.WHOLE}


def said(all_of: list[str], snapshots: list[str], first: str = "") -> dict[str, str]:
    """What btrfs-progs print of some subvolumes."""
    shown = f"ID 256 gen 9 top level 5 path {first}\n" if first else "ID 5 (FS_TREE)\n"
    time = "otime 2026-11-30 21:00:00"
    return {
        "first": shown,
        "all": "".join(f"ID 256 gen 9 top level 5 path {path}\n" for path in all_of),
        "snapshots": "".join(
            f"ID 9 gen 9 cgen 9 top level 5 {time} path {path}\n" for path in snapshots
        ),
    }


def test_snapshots_come_last_and_only_the_topmost_are_taken() -> None:
    kept = [f".snapshots/{number}/snapshot" for number in range(1, 1000)]
    listed = ["a path b", "@home", "@", *kept]
    roots, left_out = chosen(said(listed, ["@", *kept]))
    assert roots[:4] == ["/", "/@home", "/a path b", "/@"]
    assert len(roots) == 3 + SNAPSHOTS_MAX and len(left_out) == 1000 - SNAPSHOTS_MAX
    roots, left_out = chosen(said(listed, ["@", *kept], first=kept[7]))
    assert roots[:2] == [f"/{kept[7]}", "/"] and f"/{kept[7]}" not in left_out

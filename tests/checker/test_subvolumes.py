"""Btrfs subvolumes: what a guest's mounts show of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdproxy.checker.oracle import KernelOracle, subvolumes
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.oracles.condition import Condition
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
    found = kernel.follow(wanted, earlier={}, mount=mount).check(disk, None)
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

    image = tmp_path / "image"
    image.write_bytes(disk.pread(0, disk.size))
    script = "/tools/bin/btrfs subvolume set-default @; sync"
    changed = cut_off(kernel, image, script)
    assert judged(kernel, changed, files(**ROOT_FILES), ONLY) == {Condition.WHOLE}
    assert judged(kernel, changed, files(top=b"t\n"), ONLY) == {Condition.MISSING}
    assert judged(kernel, changed, files(top=b"t\n"), Mount(root="/")) == {Condition.WHOLE}
    assert kernel.roots(changed, None) == ("/@", "/", *shown[1:])
    # What came later in the guest's life was another disk with the same name: it is forgotten.
    assert judged(kernel, disk, files(top=b"t\n"), ONLY) == {Condition.WHOLE}


def test_snapshots_come_last() -> None:
    said = {
        "first": "ID 5 (FS_TREE)\n",
        "all": "ID 256 gen 9 top level 5 path a path b\nID 257 gen 9 top level 5 path @\n",
        "snapshots": "ID 256 gen 9 cgen 9 top level 5 otime 2026-11-30 21:00:00 path a path b\n",
    }
    assert subvolumes(said) == ["/", "/@", "/a path b"]

"""A guest's tree by a kernel: on Btrfs an fstab mounts subvolumes; what shows may be a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.composite import TreeCheck, scan
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where, locate, survey_tree
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.plans import GivenMount
from nbdproxy.oracles.quick import QUICK
from tests.support.serving import tool
from tests.support.states import cut_off, files
from tests.support.systems import ROOT, Part, filesystem, manifest
from tests.support.systems import disk as layout

pytestmark = pytest.mark.lab

UUID = "2f4a61f4-7c1e-4b8e-9d0e-6a1b0c9d8e7f"
MAKE = f"""
export PATH=/tools/bin:$PATH; b='btrfs subvolume'
$b create @; $b create @home; mkdir @/etc @/home @home/u
echo 'UUID={UUID} / btrfs defaults,subvol=@ 0 0' > @/etc/fstab
$b snapshot @ before
echo 'UUID={UUID} /home btrfs subvol=@home 0 0' >> @/etc/fstab
echo p > @/etc/passwd; echo 1 > @home/u/1.js; sync
"""
THERE = {"etc/passwd": b"p\n", "home/u/1.js": b"1\n"}


@pytest.fixture(scope="module")
def disk(kernel: KernelOracle, tmp_path_factory: pytest.TempPathFactory) -> OverlayDisk:
    path = tmp_path_factory.mktemp("btrfs") / "image"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", "-U", UUID, path], check=True, capture_output=True)
    return cut_off(kernel, path, MAKE)


def test_files_of_each_subvolume_are_found_and_missed(
    kernel: KernelOracle, disk: OverlayDisk
) -> None:
    wanted = files(**THERE, **{"etc/gone": b"x", "home/gone": b"x"})
    tree, found = locate(kernel, disk, wanted)
    assert [(mount.point, mount.root) for mount in tree.mounts] == [
        ("/", "/@"),
        ("/home", "/@home"),
    ]
    said = TreeCheck(kernel, found, {}, tree).check(disk, None)
    lost = {path for path, condition in said.conditions.items() if condition is Condition.MISSING}
    assert lost == {"/etc/gone", "/home/gone"}
    assert said.verdict is Verdict.FAIL and len(said.conditions) == 4
    listed = scan(kernel, disk, "/", survey_tree(kernel, disk))
    assert {entry.path for entry in listed.entries} == {"/etc/fstab", *(f"/{p}" for p in THERE)}


def test_subvolumes_are_told_too(kernel: KernelOracle, disk: OverlayDisk) -> None:
    mounts = (GivenMount("0", "/", "/@"), GivenMount(f"UUID={UUID}", "/home", "/@home"))
    tree, found = locate(kernel, disk, files(**THERE), Where(mounts=mounts))
    assert TreeCheck(kernel, found, {}, tree).check(disk, None).verdict is Verdict.PASS


def test_what_is_shown_through_a_link_cannot_be_told(kernel: KernelOracle, tmp_path: Path) -> None:
    part = Part({"/srv/www/page": "hello"}, links={"/near": "srv", "/far": "/srv"})
    ext4 = MemoryDisk(filesystem(tmp_path, part, 1))
    wanted = files(**{"www/page": b"hello"})
    for oracle in (QUICK, kernel):
        said = {
            root: TreeCheck(oracle, wanted, {}, Tree((Mount("/www", root=f"{root}/www"),)))
            .check(ext4, None)
            .verdict
            for root in ("/srv", "/near", "/far")
        }
        unknown = Verdict.UNKNOWN
        assert said == {"/srv": Verdict.PASS, "/near": unknown, "/far": unknown}


def test_a_subvolume_that_no_fstab_names_may_be_mounted(
    kernel: KernelOracle, tmp_path: Path
) -> None:
    """The root has an older file where it may be: nothing is called lost; a snapshot is none."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", "-U", UUID, path], check=True, capture_output=True)
    untold = MAKE.replace(f"echo 'UUID={UUID} /home btrfs", "true '")
    script = untold + "mkdir @/home/u; echo 0 > @/home/u/1.js; echo 0 > before/etc/lost; sync"
    disk = cut_off(kernel, path, script)
    wanted = files(**THERE, **{"etc/lost": b"0\n", "home/u/gone": b"x"})
    tree, found = locate(kernel, disk, wanted)
    assert [(mount.point, mount.root) for mount in tree.mounts] == [("/", "/@")]
    said = TreeCheck(kernel, found, {}, tree).check(disk, None)
    assert said.conditions == {
        "/etc/passwd": Condition.WHOLE,
        "/home/u/1.js": Condition.CANNOT_BE_TOLD,
        "/etc/lost": Condition.MISSING,
        "/home/u/gone": Condition.MISSING,
    }
    assert "mounted at /home" in tree.doubtful["/home/u/1.js"]


def test_a_fat_that_no_fstab_names_may_be_mounted(kernel: KernelOracle, tmp_path: Path) -> None:
    fat = tmp_path / "fat"
    with fat.open("wb") as file:
        file.truncate(8 << 20)
    tool("mkfs.fat", fat)
    (tmp_path / "new.txt").write_text("new")
    tool("mcopy", "-i", fat, tmp_path / "new.txt", "::/new.txt")
    top = Part({**ROOT, "/etc/fstab": "LABEL=root / ext4\n", "/media/new.txt": "old"}, "root")
    device = MemoryDisk(layout(tmp_path / "disk", top, Part(raw=fat.read_bytes())))
    wanted = {**ROOT, "/media/new.txt": "new"}
    for oracle, why in ((QUICK, "partition 2: FAT"), (kernel, "partition 2, mounted at /media")):
        tree, found = locate(oracle, device, manifest(wanted))
        said = TreeCheck(oracle, found, {}, tree).check(device, None)
        assert said.conditions.pop("/media/new.txt") is Condition.CANNOT_BE_TOLD
        assert set(said.conditions.values()) == {Condition.WHOLE}
        assert why in tree.doubtful["/media/new.txt"]

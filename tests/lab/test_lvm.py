"""LVM's linear volumes: made by lvm2 and written through the kernel's device mapper, read by us."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.lab import guest
from nbdproxy.lab.build import build_lab
from nbdproxy.lab.workloads import End, Ending, Workload
from nbdproxy.oracles.check import Verdict, check, locate
from nbdproxy.oracles.lvm import LinearDevice, volumes
from nbdproxy.oracles.manifest import Entry, Manifest, digest
from nbdproxy.oracles.partitions import VOLUMES, slices

pytestmark = pytest.mark.lab

MIB = 1 << 20
SET_UP = """
for m in $(cat /modules/log-writes.order); do insmod /modules/$m.ko; done
mkdir -p /run/lock/lvm /run/lvm /etc/lvm
O='devices { use_devicesfile=0 filter=["a|/dev/vdb|","r|.*|"] }
   activation { udev_sync=0 udev_rules=0 } backup { backup=0 archive=0 }'
lvm() { what=$1; shift; /tools/bin/lvm $what --config "$O" "$@" || exit 1; }
"""
MAKE = f"""{SET_UP}
lvm pvcreate /dev/vdb; lvm vgcreate -s 1M vg0 /dev/vdb
lvm lvcreate -y -an -Zn -Wn -n first -L 20M vg0; lvm lvcreate -y -an -Zn -Wn -n second -L 8M vg0
lvm lvextend vg0/first -L 30M
"""
FILL = f"""{SET_UP}
lvm vgchange -ay vg0
mount -t ext4 /dev/mapper/vg0-first /mnt && cd /mnt || exit 1
yes "some content" | head -c {24 * MIB} > a && cd / && umount /mnt
"""


def in_guest(script: str, image: Path) -> None:
    """Run a script in a guest that has the image as /dev/vdb and does not mount it itself."""
    workload = Workload("lvm", "LVM", script, mount_options="-", needs_mount=False)
    guest.run(build_lab(), workload, image, ending=Ending(End.SYNC), time_limit_s=90)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with the volumes `first`, in two pieces, which holds an ext4, and `second`, empty."""
    folder = tmp_path_factory.mktemp("lvm")
    path, inside = folder / "image", folder / "inside"
    path.touch()
    os.truncate(path, 64 * MIB)
    in_guest(MAKE, path)
    disk = FileDisk(path, read_only=True)
    first, _ = volumes(disk)
    disk.close()
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", inside, "30M"], check=True)
    data = inside.read_bytes()
    with path.open("r+b") as file:
        at = 0
        for piece in first.pieces:
            file.seek(piece.offset)
            file.write(data[at : at + piece.length])
            at += piece.length
    in_guest(FILL, path)
    return path


def test_what_the_kernel_wrote_is_read(image: Path) -> None:
    disk = FileDisk(image, read_only=True)
    found = volumes(disk)
    assert [(v.name, len(v.pieces)) for v in found] == [("vg0/first", 2), ("vg0/second", 1)]
    assert [sum(p.length for p in v.pieces) for v in found] == [30 * MIB, 8 * MIB]
    parts = slices(disk)
    assert [(p.number, p.name, p.is_direct) for p in parts] == [
        (0, "whole disk", True),
        (VOLUMES, "volume vg0/first", False),
        (VOLUMES + 1, "volume vg0/second", True),
    ]
    content = (b"some content\n" * (24 * MIB // 13 + 1))[: 24 * MIB]
    wanted = Manifest((Entry("/a", digest([content]), len(content)),))
    assert check(disk, wanted).verdict is Verdict.PASS
    assert locate(disk, wanted) == (VOLUMES, wanted)
    assert check(disk, wanted, partition=VOLUMES).verdict is Verdict.PASS


def test_a_volume_is_its_pieces_one_behind_the_other(image: Path) -> None:
    disk = FileDisk(image, read_only=True)
    first, _ = volumes(disk)
    whole = b"".join(disk.pread(p.offset, p.length) for p in first.pieces)
    device = LinearDevice(disk, first.pieces)
    assert device.pread(0, device.size) == whole
    seam = first.pieces[0].length
    assert device.pread(seam - 5, 10) == whole[seam - 5 : seam + 5]
    assert sum(e.length for e in device.on_disk(seam - 5, 10)) == 10
    shown = bytearray(device.size)
    for extent in device.data_extents(0, device.size):
        shown[extent.offset : extent.end] = whole[extent.offset : extent.end]
    assert shown == whole


@pytest.mark.parametrize("at", [512 + 30, 4096 + 20, 4096 + 512 + 100])
def test_metadata_that_is_broken_has_no_volumes(image: Path, at: int) -> None:
    """A byte of the label, of the metadata's header, and of its text."""
    disk = OverlayDisk(FileDisk(image, read_only=True))
    area = 4096
    start = int.from_bytes(disk.pread(area + 40, 8), "little")
    where = area + start + 100 if at > 4096 + 512 else at
    before = disk.pread(where, 1)
    disk.pwrite(where, bytes([before[0] ^ 1]))
    assert volumes(disk) == []
    disk.pwrite(where, before)
    assert len(volumes(disk)) == 2

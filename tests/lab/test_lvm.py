"""LVM's linear volumes: made by lvm2 and written through the kernel's device mapper, read by us."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.lab import run as guest
from nbdproxy.lab.guest.build import build_lab
from nbdproxy.lab.workloads.workloads import End, RunEnd, Workload
from nbdproxy.oracles import lvm
from nbdproxy.oracles.check import Verdict, check
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import locate
from nbdproxy.oracles.lvm import LinearDevice, LogicalVolume
from nbdproxy.oracles.manifest import Entry, Manifest, digest
from nbdproxy.oracles.mounts import Mount, Tree
from nbdproxy.oracles.partitions import VOLUMES, slices
from nbdproxy.oracles.quick import QUICK
from nbdproxy.oracles.survey import survey
from tests.support.systems import ROOT, Part, filesystem, manifest, root

pytestmark = pytest.mark.lab

MIB = 1 << 20
SET_UP = """
for m in $(cat /modules/volumes.order); do insmod /modules/$m.ko; done
mkdir -p /run/lock/lvm /run/lvm /etc/lvm
O='devices { use_devicesfile=0 filter=["a|/dev/vd[bc]|","r|.*|"] }
   activation { udev_sync=0 udev_rules=0 monitoring=0 }
   global { thin_check_executable="" } backup { backup=0 archive=0 }'
lvm() { what=$1; shift; /tools/bin/lvm $what --config "$O" "$@" || exit 1; }
"""
MAKE = f"""{SET_UP}
lvm pvcreate /dev/vdb; lvm vgcreate -s 1M vg0 /dev/vdb
lvm lvcreate -y -an -Zn -Wn -n first -L 20M vg0; lvm lvcreate -y -an -Zn -Wn -n second -L 8M vg0
lvm lvextend vg0/first -L 30M
[ -e /dev/vdc ] || exit 0
lvm pvcreate /dev/vdc; lvm vgcreate -s 1M g-1 /dev/vdc
for name in root kept; do lvm lvcreate -y -Zn -Wn -n $name -L 8M g-1; done
yes old | head -c 100000 > /dev/mapper/g--1-root
lvm lvcreate -y -s -n back -L 2M g-1/root; lvm lvcreate -y -s -n snap-2 -L 2M g-1/kept
yes new | head -c 100000 > /dev/mapper/g--1-root
exec 3< /dev/mapper/g--1-root
lvm lvconvert -b --merge g-1/back
exec 3<&-
lvm vgchange -an g-1
lvm lvcreate -y -Zn --type thin-pool -n pool -L 4M g-1
lvm lvcreate -y -an -n thin -V 64M --thinpool g-1/pool
"""
FILL = f"""{SET_UP}
lvm vgchange -ay vg0
mount -t ext4 /dev/mapper/vg0-first /mnt && cd /mnt || exit 1
yes "some content" | head -c {24 * MIB} > a && cd / && umount /mnt
lvm lvchange -ay --poll n g-1/root
[ $(head -c 3 /dev/mapper/g--1-root) = old ] || exit 1
"""


def in_guest(script: str, image: Path, second: Path | None = None) -> None:
    """Run a script in a guest that has images as /dev/vdb and vdc, and does not mount them."""
    workload = Workload("lvm", "LVM", script, mount_options="-", needs_mount=False)
    extra: tuple[str, ...] = ()
    if second is not None:
        drive = f"if=none,id=second,format=raw,file={second}"
        extra = ("-drive", drive, "-device", "virtio-blk-pci,drive=second,addr=6")
    guest.run(build_lab(), workload, image, ending=RunEnd(End.SYNC), cpus=1, extra=extra)


def volumes(disk: ReadableDevice) -> list[LogicalVolume]:
    """The volumes of the physical volume that the whole disk is."""
    found = lvm.physical_volume(disk)
    assert found is not None
    return lvm.logical_volumes([found])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with the volumes `first`, in two pieces, which holds an ext4, and `second`, empty."""
    folder = tmp_path_factory.mktemp("lvm")
    path, inside = folder / "image", folder / "inside"
    path.touch()
    os.truncate(path, 64 * MIB)
    second = folder / "second"
    second.touch()
    os.truncate(second, 64 * MIB)
    in_guest(MAKE, path, second)
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
    in_guest(FILL, path, Path(shutil.copy(second, folder / "copy")))
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
    mount = Mount(partition="vg0/first")
    assert locate(QUICK, disk, wanted) == (Tree((mount,)), wanted)
    assert check(disk, wanted, mount=mount).verdict is Verdict.PASS


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


def test_a_volume_that_no_fstab_names_may_be_mounted(image: Path, tmp_path: Path) -> None:
    """The root has an older file where it may be: nothing is called lost."""
    disk = OverlayDisk(FileDisk(image, read_only=True))
    top = root("LABEL=root / ext4\n", {"/home/u/a.js": "before"})
    parts = {"vg0/first": Part({"/u/a.js": "after"}, "home"), "vg0/second": top}
    for number, volume in enumerate(volumes(disk), start=1):
        content = filesystem(tmp_path / str(number), parts[volume.name], number)
        for piece in volume.pieces:
            disk.pwrite(piece.offset, content[: piece.length])
            content = content[piece.length :]
    tree, wanted = locate(QUICK, disk, manifest({**ROOT, "/home/u/a.js": "after"}))
    found = TreeCheck(QUICK, wanted, {}, tree).check(disk, None).conditions
    assert found.pop("/home/u/a.js") is Condition.CANNOT_BE_TOLD
    assert set(found.values()) == {Condition.WHOLE}
    assert "perhaps on volume vg0/first, mounted at /home" in tree.doubtful["/home/u/a.js"]


AREA, HEADER = 4096, 512
"""Where lvm2 puts the metadata area of a disk, and how long its header is."""


def crc(data: bytes) -> int:
    """LVM's CRC."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def with_text(
    disk: OverlayDisk, change: Callable[[bytes], bytes], *, into: int = AREA
) -> OverlayDisk:
    """Put the committed text, changed and as long as before, into an area, checksums right."""
    header = bytearray(disk.pread(AREA, HEADER))
    at, length = (int.from_bytes(header[n : n + 8], "little") for n in (40, 48))
    text = change(disk.pread(AREA + at, length))
    assert len(text) == length
    disk.pwrite(into + at, text)
    header[24:32] = into.to_bytes(8, "little")
    header[56:60] = crc(text).to_bytes(4, "little")
    header[:4] = crc(bytes(header[4:])).to_bytes(4, "little")
    disk.pwrite(into, bytes(header))
    return disk


def test_parts_of_other_volumes_are_none(image: Path) -> None:
    disk = OverlayDisk(FileDisk(image, read_only=True))
    with_text(disk, lambda text: text.replace(b'"VISIBLE"', b'"PRIVATE"', 1))
    assert [volume.name for volume in volumes(disk)] == ["vg0/second"]


@pytest.mark.parametrize("hostile", [b"[" * 2000, b"[1" * 1000])
def test_lists_in_lists_end_at_once(image: Path, hostile: bytes) -> None:
    disk = OverlayDisk(FileDisk(image, read_only=True))
    assert (
        volumes(
            with_text(
                disk, lambda text: b"a=" + hostile[: len(text) - 2].ljust(len(text) - 2, b" ")
            )
        )
        == []
    )


@pytest.mark.parametrize("is_newer_first", [True, False])
def test_the_newest_of_two_areas_counts(image: Path, is_newer_first: bool) -> None:
    """A commit that was cut off between the two."""
    disk = OverlayDisk(FileDisk(image, read_only=True))
    second = 60 * MIB
    area = next(at for at in range(512, 1024, 8) if disk.pread(at, 8) == AREA.to_bytes(8, "little"))
    label = bytearray(disk.pread(512, 512))
    size = int.from_bytes(disk.pread(area + 8, 8), "little")
    label[area - 512 + 16 : area - 512 + 32] = second.to_bytes(8, "little") + size.to_bytes(
        8, "little"
    )
    label[16:20] = crc(bytes(label[20:])).to_bytes(4, "little")
    disk.pwrite(512, bytes(label))

    def older(text: bytes) -> bytes:
        at = text.index(b"seqno = ") + 8
        number = int(text[at:].split()[0])
        return text.replace(b"seqno = %d" % number, b"seqno = %d" % (number - 1), 1)

    def newer(text: bytes) -> bytes:
        return text.replace(b"first {", b"third {", 1)

    with_text(disk, older if is_newer_first else newer, into=second)
    with_text(disk, newer if is_newer_first else older)
    assert [volume.name for volume in volumes(disk)] == ["vg0/second", "vg0/third"]


def test_what_the_kernel_does_not_show_as_it_lies_is_hidden(image: Path) -> None:
    """A snapshot is to be merged: from its next start on a guest sees the old content, not this."""
    disk = FileDisk(image.with_name("second"), read_only=True)
    found = survey(disk)
    assert [str(unreadable) for unreadable in found.unreadable] == [
        "volume g-1/root is an LVM volume that a snapshot is being merged into",
        "volume g-1/snap-2 is an LVM snapshot, which is kept as differences",
        "volume g-1/thin is an LVM volume of the type thin",
    ]
    assert {"/dev/mapper/g--1-snap--2", "/dev/g-1/snap-2"} <= found.unreadable[1].specs
    assert [part.name for part in slices(disk)] == ["whole disk", "volume g-1/kept"]
    assert disk.pread(MIB, 3) == b"new"  # where g-1/root begins

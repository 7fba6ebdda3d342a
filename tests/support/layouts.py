"""Disks of whole guests, laid out as the installers of distributions do it.

Made by each filesystem's own tools: mke2fs, mkfs.fat and mtools, mkfs.btrfs, cryptsetup, sfdisk.
Btrfs gets its subvolumes and files from a real kernel, in one guest for all disks. What is in LUKS
is as random as ciphertext, and nobody has the key. Each filesystem has two files of which a test
may take the content away, named by `LOST`.
"""

from __future__ import annotations

import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdproxy.lab import run as guest
from nbdproxy.lab.guest.build import build_lab
from nbdproxy.lab.workloads.workloads import End, RunEnd, Workload
from nbdproxy.oracles.manifest import Entry, Manifest, digest, link_entry
from tests.support.serving import tool

MIB = 1 << 20
LOST = ("unflushed.bin", "unsent.bin")
LOST_SIZE = 10_000  # so little that it is in one piece with all of them
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
FAT_ID, EXT_ID = "4C5D-1A2B", "7d0f1a54-3c5e-4d0c-9a47-1f54b1f5c001"
UBUNTU_ID, FEDORA_ID, OPENSUSE_ID = (f"c1a4c6a2-5f39-4b56-8c2f-8a1b5a3e7c0{n}" for n in "abc")
SWAP_ID = "0c6d8a1e-94f5-4c35-a3c6-5d2e7f9b1d03"
LUKS_ID = "f3b9d0c4-2a61-4e7b-b7d5-6c0e8a2f4b04"
FILES = (
    *("/etc/hostname", "/etc/passwd", "/etc/ssh/sshd_config", "/usr/bin/bash", "/usr/bin/ls"),
    *("/usr/lib/os-release", "/usr/lib/x86_64-linux-gnu/libc.so.6", "/usr/local/bin/deploy"),
    *("/usr/share/doc/bash/copyright", "/var/lib/app/state.db", "/var/log/messages"),
    *("/root/.profile", "/opt/app/server.js", "/srv/www/index.html", "/tmp/leftover"),
    *("/home/user/.bashrc", "/home/user/notes.txt", "/home/user/work/node_modules/a/index.js"),
    *("/boot/vmlinuz-6.1.0-31-amd64", "/boot/initrd.img-6.1.0-31-amd64", "/boot/grub/grub.cfg"),
    *("/boot/efi/EFI/BOOT/BOOTX64.EFI", "/boot/efi/EFI/distro/grubx64.efi"),
)
LINKS = {"/bin": "usr/bin", "/lib": "usr/lib", "/etc/os-release": "../usr/lib/os-release"}


@dataclass(frozen=True)
class Partition:
    """A partition of so many MiB: its kind, its UUID, what is mounted where, and sfdisk's type.

    `mounts` are points and the directories that show there, `/` but for subvolumes.
    """

    kind: str
    ident: str
    size: int
    mounts: dict[str, str] = field(default_factory=dict)
    type: str = "linux"


@dataclass(frozen=True)
class Layout:
    """A guest's disk: its partitions, and its fstab."""

    name: str
    partitions: tuple[Partition, ...]
    fstab: str
    btrfs_options: str = "rw"

    def place(self, path: str) -> tuple[int, str]:
        """Return the number of the partition that a path is on, and the path there."""
        found = [
            (len(point), number, root.rstrip("/") + path[len(point.rstrip("/")) :])
            for number, part in enumerate(self.partitions, start=1)
            for point, root in part.mounts.items()
            if path.startswith(point.rstrip("/") + "/")
        ]
        _, number, inside = max(found)
        return number, inside

    def kind_of(self, path: str) -> str:
        """Return what a path is on."""
        return self.partitions[self.place(path)[0] - 1].kind

    def files(self) -> dict[str, bytes]:
        """Return the content of every file of the guest, by its path."""
        lost = {
            f"{point.rstrip('/')}/lost/{name}"
            for part in self.partitions
            for point in list(part.mounts)[:1]
            for name in LOST
        }
        found = {path: _content(self.name, path, size=3_000) for path in FILES}
        found |= {path: _content(self.name, path, size=LOST_SIZE) for path in sorted(lost)}
        return {**found, "/etc/fstab": self.fstab.encode()}

    def manifest(self) -> Manifest:
        """Return the manifest of the whole guest."""
        files = [Entry(path, digest([one]), len(one)) for path, one in self.files().items()]
        return Manifest((*files, *(link_entry(path, to) for path, to in LINKS.items())))


def _content(*of: str, size: int) -> bytes:
    return random.Random("".join(of)).randbytes(size)


_EFI = Partition("fat", FAT_ID, 40, {"/boot/efi": "/"}, ESP)
_OPENSUSE = ("home", "opt", "root", "srv", "tmp", "usr/local", "var", "boot/grub")
LAYOUTS = (
    Layout(
        "debian",
        (
            _EFI,
            Partition("ext2", EXT_ID, 24, {"/boot": "/"}),
            Partition("luks", LUKS_ID, 32, {"/": "/"}),  # LVM with root, swap and home is in it
        ),
        "/dev/mapper/debian--vg-root / ext4 errors=remount-ro 0 1\n"
        f"UUID={EXT_ID} /boot ext2 defaults 0 2\n"
        f"UUID={FAT_ID} /boot/efi vfat umask=0077 0 1\n"
        "/dev/mapper/debian--vg-home /home ext4 defaults 0 2\n"
        "/dev/mapper/debian--vg-swap_1 none swap sw 0 0\n",
    ),
    Layout(
        "ubuntu",
        (_EFI, Partition("ext4", EXT_ID, 24, {"/": "/"})),
        f"/dev/disk/by-uuid/{EXT_ID} / ext4 defaults 0 1\n"
        f"/dev/disk/by-uuid/{FAT_ID} /boot/efi vfat defaults 0 1\n"
        "/swap.img none swap sw 0 0\n",
    ),
    Layout(
        "ubuntu-btrfs",
        (_EFI, Partition("btrfs", UBUNTU_ID, 128, {"/": "/@", "/home": "/@home"})),
        f"UUID={UBUNTU_ID} / btrfs defaults,subvol=@ 0 1\n"
        f"UUID={FAT_ID} /boot/efi vfat umask=0077 0 1\n"
        f"UUID={UBUNTU_ID} /home btrfs defaults,subvol=@home 0 2\n"
        "/swapfile none swap sw 0 0\n",
    ),
    Layout(
        "fedora",
        (
            _EFI,
            Partition("ext4", EXT_ID, 24, {"/boot": "/"}),
            Partition("btrfs", FEDORA_ID, 128, {"/": "/root", "/home": "/home"}),
        ),
        f"UUID={FEDORA_ID} / btrfs subvol=root,compress=zstd:1 0 0\n"
        f"UUID={EXT_ID} /boot ext4 defaults 1 2\n"
        f"UUID={FAT_ID} /boot/efi vfat umask=0077,shortname=winnt 0 2\n"
        f"UUID={FEDORA_ID} /home btrfs subvol=home,compress=zstd:1 0 0\n",
        "compress=zstd:1",
    ),
    Layout(
        "opensuse",
        (
            _EFI,
            Partition(
                "btrfs",
                OPENSUSE_ID,
                128,
                {
                    "/": "/@/.snapshots/1/snapshot",
                    "/.snapshots": "/@/.snapshots",
                    **{f"/{name}": f"/@/{name}" for name in _OPENSUSE},
                },
            ),
            Partition("swap", SWAP_ID, 8, type="swap"),
        ),
        f"UUID={OPENSUSE_ID} / btrfs defaults 0 0\n"
        + "".join(
            f"UUID={OPENSUSE_ID} /{name} btrfs subvol=/@/{name} 0 0\n"
            for name in (".snapshots", *_OPENSUSE)
        )
        + f"UUID={FAT_ID} /boot/efi vfat utf8 0 2\nUUID={SWAP_ID} swap swap defaults 0 0\n",
    ),
)


def make(folder: Path) -> dict[str, Path]:
    """Make all disks in a folder; return them by the names of the layouts."""
    found = {}
    for layout in LAYOUTS:
        (work := folder / f"{layout.name}.d").mkdir()
        found[layout.name] = _disk(layout, folder, work)
    with_btrfs = [layout for layout in LAYOUTS if _btrfs_number(layout)]
    _fill_btrfs(folder, with_btrfs, [found[layout.name] for layout in with_btrfs])
    return found


def _btrfs_number(layout: Layout) -> int:
    kinds = [part.kind for part in layout.partitions]
    return kinds.index("btrfs") + 1 if "btrfs" in kinds else 0


def _disk(layout: Layout, folder: Path, work: Path) -> Path:
    """Make a disk of all partitions, but for what is in Btrfs."""
    disk, at, table = folder / f"{layout.name}.img", 1, "label: gpt\n"
    places = []
    for number, part in enumerate(layout.partitions, start=1):
        table += f"start={at * MIB // 512}, size={part.size * MIB // 512}, type={part.type}\n"
        image = blank(work / f"{number}.img", part.size)
        tree = work / str(number)
        _write_tree(layout, number, tree)
        _MAKERS[part.kind](image, tree, part.ident)
        places.append((at, image))
        at += part.size
    blank(disk, at + 1)
    subprocess.run(["/sbin/sfdisk", "-q", disk], input=table.encode(), check=True)
    for start, image in places:
        tool("dd", f"if={image}", f"of={disk}", "bs=1M", f"seek={start}", "conv=notrunc,sparse")
        image.unlink()
    return disk


def blank(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size * MIB)
    return path


def _write_tree(layout: Layout, number: int, into: Path) -> None:
    """Write the files of a partition into a folder, with empty ones where others are mounted."""
    into.mkdir()
    for path in (point for part in layout.partitions for point in part.mounts if point != "/"):
        on, inside = layout.place(path)
        if on == number:
            (into / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for path, content in layout.files().items():
        on, inside = layout.place(path)
        if on == number:
            file = into / inside.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for path, target in LINKS.items():
        on, inside = layout.place(path)
        if on == number:
            (into / inside.lstrip("/")).symlink_to(target)


def _fat(image: Path, tree: Path, ident: str) -> None:
    tool("mkfs.fat", "-F32", "-s1", "-i", ident.replace("-", ""), image)
    tool("mcopy", "-s", "-i", image, *sorted(tree.iterdir()), "::")


def _ext(kind: str) -> Callable[[Path, Path, str], None]:
    def fill(image: Path, tree: Path, ident: str) -> None:
        tool("mke2fs", "-q", "-F", "-t", kind, "-U", ident, "-d", tree, image)

    return fill


def _luks(image: Path, tree: Path, ident: str) -> None:
    """Make a LUKS2 container; its header takes 16 MiB, and all behind that is ciphertext."""
    key = tree.with_suffix(".key")
    key.write_text("secret")
    pbkdf = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--uuid", ident)
    tool("cryptsetup", "-q", "luksFormat", "--type", "luks2", *pbkdf, image, key)
    with image.open("r+b") as file:
        file.seek(16 * MIB)
        file.write(_content("ciphertext", size=image.stat().st_size - 16 * MIB))


def _btrfs(image: Path, _: Path, ident: str) -> None:
    tool("mkfs.btrfs", "-q", "-U", ident, image)


def _swap(image: Path, _: Path, ident: str) -> None:
    tool("mkswap", "-q", "-U", ident, image)


_MAKERS = {
    "fat": _fat,
    "ext2": _ext("ext2"),
    "ext4": _ext("ext4"),
    "luks": _luks,
    "btrfs": _btrfs,
    "swap": _swap,
}


def _fill_btrfs(folder: Path, layouts: Sequence[Layout], disks: Sequence[Path]) -> None:
    """Let a kernel make the subvolumes of some disks, and write their files into them."""
    packed = folder / "files.tar"
    with tarfile.open(packed, "w") as archive:
        for layout in layouts:
            number = _btrfs_number(layout)
            archive.add(folder / f"{layout.name}.d" / str(number), layout.name)
    script, extra = ["for m in $(cat /modules/btrfs.order); do insmod /modules/$m.ko; done"], []
    for at, (layout, disk) in enumerate(zip(layouts, disks, strict=True)):
        extra += ["-drive", f"if=none,id=disk{at},format=raw,file={disk}"]
        extra += ["-device", f"virtio-blk-pci,drive=disk{at},addr={at + 6}"]
        script += _subvolumes(layout, f"/dev/vd{chr(ord('c') + at)}{_btrfs_number(layout)}")
    script += ["tar xf /dev/vdb -C /m || exit 1", *_opensuse_snapshots(), "umount /m/*"]
    workload = Workload("fill", "fill", "\n".join(script), mount_options="-", needs_mount=False)
    ending = RunEnd(End.SYNC)
    guest.run(build_lab(), workload, packed, ending=ending, time_limit_s=180, extra=extra)


def _subvolumes(layout: Layout, device: str) -> Iterator[str]:
    """Yield the lines of shell that mount a disk's Btrfs and make its subvolumes."""
    top = f"/m/{layout.name}"
    yield f"mkdir -p {top}; mount -t btrfs -o {layout.btrfs_options} {device} {top} || exit 1"
    roots = layout.partitions[_btrfs_number(layout) - 1].mounts.values()
    for root in sorted({*roots, *("/@" for one in roots if one.startswith("/@/"))}):
        yield f"mkdir -p {top}{root.rpartition('/')[0]}"
        yield f"/tools/bin/btrfs subvolume create {top}{root} || exit 1"


def _opensuse_snapshots() -> Iterator[str]:
    """Yield the lines that make the first snapshot the default one, and a second one of it."""
    there = "/m/opensuse/@/.snapshots"
    yield f"/tools/bin/btrfs subvolume set-default {there}/1/snapshot || exit 1"
    yield f"mkdir {there}/2"
    yield f"/tools/bin/btrfs subvolume snapshot -r {there}/1/snapshot {there}/2/snapshot || exit 1"

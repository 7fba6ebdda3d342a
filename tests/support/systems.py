"""Disks with several filesystems, as a guest has them: made by sfdisk and mke2fs."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.check import Findings
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.locate import Where, locate
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import PartitionName, Tree
from nbdproxy.oracles.quick import QUICK
from tests.support.serving import tool

MIB = 1 << 20
PART = 8 * MIB
LUKS = b"LUKS\xba\xbe\x00\x01" + b"aes".ljust(32, b"\0") + bytes(472)


def ident(number: int) -> str:
    """The UUID of a partition's filesystem, or of the partition."""
    return f"{number:08d}-1111-4222-8333-444444444444"


@dataclass(frozen=True, slots=True)
class Part:
    """What a partition of PART bytes is to hold: files, or bytes at its beginning."""

    files: Mapping[str, str | bytes] = field(default_factory=dict)
    label: str = ""
    raw: bytes = b""
    folders: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)


BOOT = Part({"/vmlinuz": "kernel", "/grub/grub.cfg": "menu"}, "boot")
ROOT = {"/etc/passwd": "users", "/etc/hosts": "hosts", "/usr/bin/true": "true"}
GUEST = {"/boot/vmlinuz": "kernel", "/boot/grub/grub.cfg": "menu", **ROOT}


def filesystem(folder: Path, part: Part, number: int) -> bytes:
    """Return an ext4 with some files, made in an empty folder."""
    root = folder / "root"
    root.mkdir(parents=True)
    for path, content in part.files.items():
        (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (root / path.lstrip("/")).write_bytes(data)
    for path in part.folders:
        (root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for path, target in part.links.items():
        (root / path.lstrip("/")).symlink_to(target)
    image = folder / "image"
    options = ("-t", "ext4", "-b", "4096", "-U", ident(number), "-L", part.label, "-d", root)
    tool("mke2fs", "-q", "-F", *options, image, "8M")
    return image.read_bytes()


def disk(folder: Path, *parts: Part, first: int = 1) -> bytes:
    """Return a disk with a GPT and these partitions, each PART bytes; the first begins at 1 MiB.

    The ids of filesystems count from `first`, those of partitions from 100 more.
    """
    folder.mkdir(exist_ok=True)
    image = folder / "disk"
    content = bytearray(MIB + len(parts) * PART + MIB)
    image.write_bytes(content)
    table = "label: gpt\n" + "".join(
        f"start={(MIB + at * PART) // 512}, size={PART // 512}, uuid={ident(100 + at + first)}, "
        f'name="part {at + 1}"\n'
        for at in range(len(parts))
    )
    subprocess.run(["/sbin/sfdisk", "-q", image], input=table.encode(), check=True)
    content[:] = image.read_bytes()
    for at, part in enumerate(parts):
        raw = part.raw or filesystem(folder / f"part{at + 1}", part, at + first)
        content[MIB + at * PART : MIB + at * PART + len(raw)] = raw
    return bytes(content)


def manifest(files: Mapping[str, str]) -> Manifest:
    """The manifest of files by their paths in the guest, with what they hold."""
    return Manifest(
        tuple(
            Entry(path, hashlib.sha256(text.encode()).hexdigest(), len(text))
            for path, text in files.items()
        )
    )


def with_files(folder: Path, content: bytes, number: int, files: Mapping[str, str]) -> bytes:
    """Return a disk with more files on the filesystem of a partition, put there by debugfs."""
    folder.mkdir()
    start = MIB + (number - 1) * PART
    image = folder / "image"
    image.write_bytes(content[start : start + PART])
    commands = []
    for at, (path, text) in enumerate(files.items()):
        (folder / str(at)).write_text(text)
        where, _, name = path.rpartition("/")
        commands += [f"cd {where or '/'}", f"write {folder / str(at)} {name}"]
    (folder / "commands").write_text("\n".join(commands) + "\n")
    said = tool("debugfs", "-w", "-f", folder / "commands", image)
    assert "Allocated" in said, said
    return content[:start] + image.read_bytes() + content[start + PART :]


def root(fstab: str | None, more: Mapping[str, str] | None = None, *folders: str) -> Part:
    """The root of a system with an fstab."""
    files = {**ROOT, **(more or {})}
    if fstab is not None:
        files["/etc/fstab"] = fstab
    return Part(files, "root", folders=("/boot", "/home", "/var", *folders))


def judged(
    device: MemoryDisk, wanted: Mapping[str, str], where: Where | None = None
) -> tuple[Tree, Findings]:
    """Find the files of a guest, and judge them."""
    tree, found = locate(QUICK, device, manifest(wanted), where or Where())
    return tree, TreeCheck(QUICK, found, {}, tree).check(device, None)


def placed(tree: Tree) -> dict[str, PartitionName]:
    """What is mounted where."""
    return {mount.point: mount.partition for mount in tree.mounts}

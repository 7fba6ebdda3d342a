"""Disks with several filesystems, as a guest has them: made by sfdisk and mke2fs."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbdproxy.oracles.manifest import Entry, Manifest
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


def disk(folder: Path, *parts: Part) -> bytes:
    """Return a disk with a GPT and these partitions, each PART bytes; the first begins at 1 MiB."""
    image = folder / "disk"
    content = bytearray(MIB + len(parts) * PART + MIB)
    image.write_bytes(content)
    table = "label: gpt\n" + "".join(
        f"start={(MIB + at * PART) // 512}, size={PART // 512}, uuid={ident(100 + at + 1)}, "
        f'name="part {at + 1}"\n'
        for at in range(len(parts))
    )
    subprocess.run(["/sbin/sfdisk", "-q", image], input=table.encode(), check=True)
    content[:] = image.read_bytes()
    for at, part in enumerate(parts):
        raw = part.raw or filesystem(folder / f"part{at + 1}", part, at + 1)
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

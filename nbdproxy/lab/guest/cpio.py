"""Archives in cpio's `newc` form, the one the Linux kernel unpacks as an initramfs.

Guarantees: the same entries give the same bytes (owner root, time 0), and device nodes need no
root, since nothing is ever created on the host. Archives may be concatenated; later entries win.
Does not cover hard links, checksums (`crc` form) and members of 4 GiB or more.
Source of the form: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_ALIGNMENT = 4
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """One member: `mode` has the file type's bits, `device` is (major, minor) of a node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> ArchiveMember:
    """Describe a directory."""
    return ArchiveMember(name, stat.S_IFDIR | mode)


def regular(name: str, data: bytes, mode: int = 0o644) -> ArchiveMember:
    """Describe a regular file."""
    return ArchiveMember(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> ArchiveMember:
    """Describe a symbolic link."""
    return ArchiveMember(name, stat.S_IFLNK | 0o777, target.encode())


def char_device(name: str, major: int, minor: int) -> ArchiveMember:
    """Describe a character device."""
    return ArchiveMember(name, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: Iterable[ArchiveMember]) -> bytes:
    """Return the archive; parents have to come before what they hold."""
    out = bytearray()
    for number, entry in enumerate(chain(entries, [ArchiveMember(_TRAILER, 0)]), start=1):
        _append(out, number, entry)
    out += bytes(-len(out) % _BLOCK)
    return bytes(out)


def _append(out: bytearray, number: int, entry: ArchiveMember) -> None:
    name = entry.name.lstrip("/").encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    header = (
        number,
        entry.mode,
        0,  # owner
        0,  # group
        links,
        0,  # time
        len(entry.data),
        0,  # the device the member itself lies on: major, minor
        0,
        *entry.device,
        len(name),
        0,  # checksum, used only by the `crc` form
    )
    out += _MAGIC + b"".join(b"%08X" % field for field in header) + name
    out += bytes(-len(out) % _ALIGNMENT)
    out += entry.data
    out += bytes(-len(out) % _ALIGNMENT)

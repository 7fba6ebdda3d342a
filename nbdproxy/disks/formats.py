"""Image formats that hold a disk: how a file tells which one it is, and who can read it.

One table, for whoever serves an image (QEMU's driver of that name reads it) and for whoever must
not take the bytes of such a file for a disk. The magics stand in QEMU's `block/*.c`, in the
functions named `*_probe`. Not covered: formats without a magic, and what is inside a file.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError

ReadAt = Callable[[int, int], bytes]
"""Reads so many bytes at an offset; fewer at the end of the file."""

_SECTOR = 512


class ImageFormat(StrEnum):
    """How the bytes of an image are taken: as they are, or as QEMU's driver of that name does."""

    RAW = "raw"
    QCOW2 = "qcow2"
    QCOW = "qcow"
    VMDK = "vmdk"
    VDI = "vdi"
    VHDX = "vhdx"
    VPC = "vpc"
    QED = "qed"
    PARALLELS = "parallels"
    DMG = "dmg"
    BOCHS = "bochs"
    CLOOP = "cloop"
    LUKS = "luks"


class Magic(NamedTuple):
    """Bytes that stand at a place of the file, from its end if that is negative."""

    at: int
    bytes: bytes


class KnownFormat(NamedTuple):
    """What a format is called, what it is told by, and whether QEMU can write it."""

    said: str
    magics: tuple[Magic, ...]
    writable: bool = True


FORMATS = {
    ImageFormat.QCOW2: KnownFormat(
        "a qcow2 file", (Magic(0, b"QFI\xfb\0\0\0\2"), Magic(0, b"QFI\xfb\0\0\0\3"))
    ),
    ImageFormat.QCOW: KnownFormat("a qcow file (version 1)", (Magic(0, b"QFI\xfb\0\0\0\1"),)),
    ImageFormat.VMDK: KnownFormat(
        "a VMDK image of VMware",
        (Magic(0, b"KDMV"), Magic(0, b"COWD"), Magic(0, b"# Disk DescriptorFile")),
    ),
    ImageFormat.VDI: KnownFormat("a VDI image of VirtualBox", (Magic(64, b"\x7f\x10\xda\xbe"),)),
    ImageFormat.VHDX: KnownFormat("a VHDX image of Hyper-V", (Magic(0, b"vhdxfile"),)),
    ImageFormat.VPC: KnownFormat(
        "a VHD image of Hyper-V or Virtual PC",
        (Magic(0, b"conectix"), Magic(-_SECTOR, b"conectix")),
    ),
    ImageFormat.QED: KnownFormat("a QED image", (Magic(0, b"QED\0"),)),
    ImageFormat.PARALLELS: KnownFormat(
        "a disk of Parallels",
        (Magic(0, b"WithoutFreeSpace"), Magic(0, b"WithouFreSpacExt")),
    ),
    ImageFormat.DMG: KnownFormat(
        "a DMG image of macOS", (Magic(-_SECTOR, b"koly"),), writable=False
    ),
    ImageFormat.BOCHS: KnownFormat(
        "a disk of Bochs", (Magic(0, b"Bochs Virtual HD Image\0"),), writable=False
    ),
    ImageFormat.CLOOP: KnownFormat(
        "a cloop image", (Magic(0, b"#!/bin/sh\n#V2.0 Format\n"),), writable=False
    ),
    ImageFormat.LUKS: KnownFormat("encrypted with LUKS", (Magic(0, b"LUKS\xba\xbe"),)),
}
"""All formats but raw. An unknown version of qcow2 counts as qcow2: QEMU says what is wrong."""

_QCOW = b"QFI\xfb"


class ForeignFormatError(FilesystemError):
    """The bytes of a disk are those of an image file, whose format is not read here."""


def format_of(read: ReadAt, size: int, *, footers: bool = True) -> ImageFormat | None:
    """Return the format that an image of `size` bytes says it has, None for raw bytes.

    Without `footers` only the first sector is read.
    """
    for found, known in FORMATS.items():
        for at, magic in known.magics:
            if at < 0 and not footers:
                continue
            where = at if at >= 0 else size + at
            if where >= 0 and read(where, len(magic)) == magic:
                return found
    return ImageFormat.QCOW2 if read(0, len(_QCOW)) == _QCOW else None


def format_of_device(device: ReadableDevice, *, footers: bool = True) -> ImageFormat | None:
    """Return what `format_of` tells of a disk; may raise OSError as its reads do."""

    def read(offset: int, length: int) -> bytes:
        return device.pread(offset, max(0, min(length, device.size - offset)))

    return format_of(read, device.size, footers=footers)


def format_of_file(image: Path) -> ImageFormat | None:
    """Return what `format_of` tells of a file; None if it cannot be read, or is none."""
    try:
        if not (image.is_file() or image.is_block_device()):
            return None
        with image.open("rb") as file:
            size = file.seek(0, 2)

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            return format_of(read, size)
    except OSError:
        return None  # opening it for good will say why


def refuse_foreign(device: ReadableDevice, *, footers: bool = True) -> None:
    """Raise ForeignFormatError for a disk whose bytes are an image file that is not read here.

    A disk that is encrypted with LUKS as a whole is a disk: a guest does that, too.
    """
    found = format_of_device(device, footers=footers)
    if found not in {None, ImageFormat.QCOW2, ImageFormat.LUKS}:
        raise ForeignFormatError(
            f"this is {FORMATS[found].said}, and its bytes are not the disk's; copy the disk with: "
            f"qemu-img convert -f {found} -O raw IMAGE raw.img (or record it with nbdproxy serve "
            f"--format {found})"
        )

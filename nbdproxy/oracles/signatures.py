"""Signatures of what a disk or a part of it holds, other than filesystems that are read here.

Detected is what util-linux' libblkid detects, as far as virtual machines have it: what contains
filesystems (LUKS, RAID, caches, pools), filesystems that no oracle reads, tables within parts, and
what holds no files (swap). Only signatures are looked at, nothing is verified. Source:
libblkid/src/superblocks and the formats' own headers.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from enum import Enum, auto
from typing import Annotated, NamedTuple

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.oracles.structs import Field, StructLayout

_KIB, _MIB = 1 << 10, 1 << 20
_SECTOR = 512


class Usage(Enum):
    """Whether something may hold files.

    WRAPPER     contains filesystems, or a copy of them; other signatures there do not count
    FILESYSTEM  holds files
    TABLE       divides its part again
    NO_FILES    holds none
    """

    WRAPPER = auto()
    FILESYSTEM = auto()
    TABLE = auto()
    NO_FILES = auto()


class Signature(NamedTuple):
    """A detected signature: `what` in words, UUID, label, and nodes in /dev.

    `at` is the offset of the superblock of a member of an array, in bytes.
    """

    what: str
    usage: Usage
    ident: str = ""
    label: str = ""
    nodes: tuple[str, ...] = ()
    at: int = 0


class _Magic(NamedTuple):
    """A signature at fixed places: any of `words` at any of `places`.

    `ident` and `label` are places (and a length) from the start of the part.
    """

    what: str
    usage: Usage
    places: tuple[int, ...]
    words: tuple[bytes, ...]
    ident: int | None = None
    label: tuple[int, int] | None = None


class LuksHeader(NamedTuple):
    """The fields that both versions have in one place (LUKS On-Disk Format Specification)."""

    magic: Annotated[bytes, Field(0, "6s")]
    version: Annotated[int, Field(6, "H")]
    label: Annotated[bytes, Field(24, "48s")]
    uuid: Annotated[bytes, Field(168, "40s")]
    hdr_offset: Annotated[int, Field(256, "Q")]


_LUKS = StructLayout(LuksHeader, ">")
_LUKS_MAGIC, _LUKS_SECOND = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
_LUKS_SECOND_AT = tuple(0x4000 << n for n in range(9))  # LUKS2's second header, by the first's size


class MdSuperblock1(NamedTuple):
    """A member of version 1 (md.4, include/uapi/linux/raid/md_p.h: struct mdp_superblock_1)."""

    magic: Annotated[int, Field(0, "I")]
    major_version: Annotated[int, Field(4, "I")]
    set_uuid: Annotated[bytes, Field(16, "16s")]
    set_name: Annotated[bytes, Field(32, "32s")]
    level: Annotated[int, Field(72, "i")]
    super_offset: Annotated[int, Field(144, "Q")]


class MdSuperblock0(NamedTuple):
    """A member of version 0.90 (md_p.h: mdp_super_t), in the byte order of its machine."""

    magic: Annotated[int, Field(0, "I")]
    major_version: Annotated[int, Field(4, "I")]
    minor_version: Annotated[int, Field(8, "I")]
    level: Annotated[int, Field(28, "i")]
    md_minor: Annotated[int, Field(44, "I")]


_MD = StructLayout(MdSuperblock1, "<")
_MD_OLD = (StructLayout(MdSuperblock0, "<"), StructLayout(MdSuperblock0, ">"))
_MD_MAGIC = 0xA92B4EFC
_MD_OLD_UNIT = 64 * _KIB
_LEVELS = {-4: "multipath", -1: "linear", 0: "RAID0", 1: "RAID1"}
_DRBD_BACK, _DRBD_MAGIC_AT = 4096, 60  # of the versions 8, 8.4 and 9
_DRBD_MAGIC = tuple(bytes.fromhex(f"837402{low}") for low in ("6b", "6c", "6d"))
_DDF = b"\xde\x11\xde\x11"
_FIRMWARE_RAID = (
    (2, b"Intel Raid ISM Cfg Sig. ", "an Intel RAID"),
    (1, _DDF, "a DDF RAID"),
    (257, _DDF, "a DDF RAID"),
)
"""Sectors from the end, and what stands there."""
_ZFS_UBERBLOCKS = 128 * _KIB
_ZFS_LIST = tuple(bytes.fromhex(f"01{order}0000 00000000 00000001") for order in ("00", "01"))
"""How the list of a pool's properties begins in XDR: its encoding, byte order, version, flags."""
_ZFS_MAGIC = (b"\x0c\xb1\xba\0\0\0\0\0", b"\0\0\0\0\0\xba\xb1\x0c")
_VTOC = b"\xee\xde\x0d\x60"
_BITLOCKER = tuple(
    bytes.fromhex(guid.replace(" ", "")) for guid in (
        "3b d6 67 49 29 2e d8 4a 83 99 f6 a3 39 e3 d0 01",
        "3b 4d a8 92 80 dd 0e 4d 9e 4e b1 e3 28 4e ae d8",
    )
)  # fmt: skip

_W, _F, _T, _N = Usage.WRAPPER, Usage.FILESYSTEM, Usage.TABLE, Usage.NO_FILES
_MAGICS = (
    _Magic("BitLocker", _W, (3,), (b"-FVE-FS-",)),
    _Magic("BitLocker", _W, (424,), _BITLOCKER),
    _Magic("part of a bcache", _W, (4096 + 24,),
           (bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"),), 4096 + 40),
    _Magic("part of a Stratis pool", _W, (516, 4612), (b"!Stra0tis\x86\xff\x02^\x41rh",)),
    _Magic("VDO", _W, (0,), (b"dmvdo001",)),
    _Magic("an LVM snapshot, which is kept as differences", _W, (0,), (b"SnAp",)),
    _Magic("of dm-integrity", _W, (0,), (b"integrt\0",)),
    _Magic("a volume of VMFS", _W, (_MIB,), (b"\x0d\xd0\x01\xc0",)),
    _Magic("bcachefs", _F, (4096 + 24,), (bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"),)),
    _Magic("F2FS", _F, (_KIB,), (b"\x10\x20\xf5\xf2",), _KIB + 108),
    _Magic("ReiserFS", _F, (8 * _KIB + 52, 64 * _KIB + 52),
           (b"ReIsErFs", b"ReIsEr2Fs", b"ReIsEr3Fs"), 64 * _KIB + 84, (64 * _KIB + 100, 16)),
    _Magic("Reiser4", _F, (64 * _KIB,), (b"ReIsEr4",), 64 * _KIB + 20, (64 * _KIB + 36, 16)),
    _Magic("JFS", _F, (32 * _KIB,), (b"JFS1",), 32 * _KIB + 136, (32 * _KIB + 152, 16)),
    _Magic("HFS+", _F, (_KIB,), (b"H+\0\x04", b"HX\0\x05")),
    _Magic("APFS", _F, (32,), (b"NXSB",)),
    _Magic("squashfs", _F, (0,), (b"hsqs", b"sqsh")),
    _Magic("EROFS", _F, (_KIB,), (b"\xe2\xe1\xf5\xe0",), _KIB + 48, (_KIB + 64, 16)),
    _Magic("ISO 9660", _F, (32 * _KIB + 1,), (b"CD001",)),
    _Magic("UDF", _F, (32 * _KIB + 1,), (b"BEA01", b"NSR02", b"NSR03")),
    _Magic("UFS", _F, (8 * _KIB + 1372, 64 * _KIB + 1372, 256 * _KIB + 1372),
           (b"\x54\x19\x01\x00", b"\x00\x01\x19\x54", b"\x19\x01\x54\x19", b"\x19\x54\x01\x19")),
    _Magic("zonefs", _F, (0,), (b"SFOZ",)),
    _Magic("OCFS2", _F, (1 * _KIB, 2 * _KIB, 4 * _KIB, 8 * _KIB), (b"OCFSV2",)),
    _Magic("GFS2", _F, (64 * _KIB,), (b"\x01\x16\x19\x70\0\0\0\x01",), 64 * _KIB + 256),
    _Magic("VMFS", _F, (2 * _MIB,), (b"\x5e\xf1\xab\x2f",)),
    _Magic("ReFS", _F, (0,), (b"\0\0\0ReFS\0",)),
    _Magic("cramfs", _F, (0,), (b"\x45\x3d\xcd\x28", b"\x28\xcd\x3d\x45")),
    _Magic("romfs", _F, (0,), (b"-rom1fs-",)),
    _Magic("swap", _N, tuple((4096 << n) - 10 for n in range(5)),
           (b"SWAPSPACE2", b"SWAP-SPACE", b"S1SUSPEND", b"S2SUSPEND", b"LINHIB0001")),
    _Magic("divided by a Solaris VTOC", _T, (512 + 12,), (_VTOC,)),
    _Magic("divided by a BSD disklabel", _T, (512, 64), (b"\x57\x45\x56\x82", b"\x82\x56\x45\x57")),
    _Magic("divided by an SGI disk label", _T, (0,), (b"\x0b\xe5\xa9\x41",)),
    _Magic("divided by an Apple partition map", _T, (512, 2048, 4096), (b"PM\0\0",)),
    _Magic("divided by an Amiga partition table", _T, (0, 512, 1024), (b"RDSK",)),
    _Magic("a Windows dynamic disk", _T, (6 * 512,), (b"PRIVHEAD",)),
)  # fmt: skip
_WEAK = (
    _Magic("divided by a Sun disklabel", _T, (508,), (b"\xda\xbe",)),
    _Magic("NILFS2", _F, (_KIB + 6,), (b"\x34\x34",), _KIB + 152, (_KIB + 168, 80)),
    _Magic("HFS", _F, (_KIB,), (b"BD",)),
    _Magic("MINIX", _F, (_KIB + 16, _KIB + 24),
           (b"\x7f\x13", b"\x8f\x13", b"\x68\x24", b"\x78\x24", b"\x5a\x4d")),
)  # fmt: skip
"""Signatures of two bytes, which other data may have by chance: used if nothing else fits."""


def signatures(device: ReadableDevice) -> Iterator[Signature]:
    """Yield the signatures at the start, and of arrays at the end; wrappers come first."""
    for find in (_luks, _md_at_start, members):
        yield from find(device)
    for magic in _MAGICS:
        if _has(device, magic):
            yield _seen(device, magic)
    yield from _zfs(device)


def weak_signatures(device: ReadableDevice) -> Iterator[Signature]:
    """Yield signatures that other data may have by chance."""
    return (_seen(device, magic) for magic in _WEAK if _has(device, magic))


def members(device: ReadableDevice) -> Iterator[Signature]:
    """Yield the arrays of which a disk is a member, by superblocks at its end."""
    for find in (_md_at_end, _md_old, _firmware_raid, _drbd):
        yield from find(device)


def text(raw: bytes) -> str:
    """Decode what is before the first zero byte."""
    return raw.partition(b"\0")[0].decode("utf-8", "replace")


def read(device: ReadableDevice, at: int, length: int) -> bytes:
    """Return a range of a device; nothing if it is not all there."""
    return device.pread(at, length) if at >= 0 and 0 < length <= device.size - at else b""


def _has(device: ReadableDevice, magic: _Magic) -> bool:
    longest = max(map(len, magic.words))
    return any(
        read(device, at, min(longest, device.size - at)).startswith(magic.words)
        for at in magic.places
    )


def _seen(device: ReadableDevice, magic: _Magic) -> Signature:
    ident = label = ""
    if magic.ident is not None and (raw := read(device, magic.ident, 16)):
        ident = str(uuid.UUID(bytes=raw))
    if magic.label is not None:
        label = text(read(device, *magic.label))
    return Signature(magic.what, magic.usage, ident, label)


def _luks(device: ReadableDevice) -> Iterator[Signature]:
    for at in (0, *_LUKS_SECOND_AT):
        if not (raw := read(device, at, _LUKS.size)):
            return
        if not raw.startswith(_LUKS_SECOND if at else _LUKS_MAGIC):
            continue
        found = _LUKS.unpack_from(raw)
        if at and found.hdr_offset != at:
            continue
        ident = text(found.uuid)
        label = text(found.label) if found.version > 1 else ""
        nodes = (f"/dev/mapper/luks-{ident}",)
        yield Signature(f"LUKS{found.version}", Usage.WRAPPER, ident, label, nodes)
        return


def _md_at_start(device: ReadableDevice) -> Iterator[Signature]:
    for at in (0, 4 * _KIB):
        yield from _md_at(device, at)


def _md_at_end(device: ReadableDevice) -> Iterator[Signature]:
    yield from _md_at(device, (device.size // _SECTOR - 16 & ~7) * _SECTOR)


def _md_at(device: ReadableDevice, at: int) -> Iterator[Signature]:
    if not (raw := read(device, at, _MD.size)):
        return
    found = _MD.unpack_from(raw)
    if (found.magic, found.major_version, found.super_offset * _SECTOR) != (_MD_MAGIC, 1, at):
        return
    name = text(found.set_name).rpartition(":")[2]
    nodes = (f"/dev/md/{name}", *((f"/dev/md{name}",) if name.isdecimal() else ()))
    yield _member(found.level, str(uuid.UUID(bytes=found.set_uuid)), nodes if name else (), at)


def _md_old(device: ReadableDevice) -> Iterator[Signature]:
    at = (device.size & -_MD_OLD_UNIT) - _MD_OLD_UNIT
    for layout in _MD_OLD:
        if not (raw := read(device, at, layout.size)):
            return
        found = layout.unpack_from(raw)
        if (found.magic, found.major_version, found.minor_version) == (_MD_MAGIC, 0, 90):
            yield _member(found.level, "", (f"/dev/md{found.md_minor}",), at)


def _member(level: int, ident: str, nodes: tuple[str, ...], at: int) -> Signature:
    what = f"a member of an md array ({_LEVELS.get(level, f'RAID{level}')})"
    return Signature(what, Usage.WRAPPER, ident, nodes=nodes, at=at)


def _firmware_raid(device: ReadableDevice) -> Iterator[Signature]:
    for back, word, name in _FIRMWARE_RAID:
        at = device.size - back * _SECTOR
        if read(device, at, len(word)) == word:
            yield Signature(f"a member of {name}", Usage.WRAPPER, at=at)


def _drbd(device: ReadableDevice) -> Iterator[Signature]:
    at = device.size - _DRBD_BACK
    if read(device, at + _DRBD_MAGIC_AT, 4) in _DRBD_MAGIC:
        yield Signature("part of a DRBD", Usage.WRAPPER, at=at)


def _zfs(device: ReadableDevice) -> Iterator[Signature]:
    """Look for an uberblock in the first two of ZFS' four labels."""
    for label in (0, 256 * _KIB):
        if not read(device, label + 16 * _KIB, len(_ZFS_LIST[0])).startswith(_ZFS_LIST):
            continue
        raw = read(device, label + _ZFS_UBERBLOCKS, _ZFS_UBERBLOCKS)
        if any(raw.startswith(_ZFS_MAGIC, at) for at in range(0, len(raw), _KIB)):
            yield Signature("part of a ZFS pool", Usage.WRAPPER)
            return

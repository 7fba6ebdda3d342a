r"""Parses fstab(5) and crypttab(5): what a guest mounts where.

Blanks of a field are octal escapes (`\040`), and a tag's value may be in quotes. Lines that are
not valid are skipped, as the guest's own programs do.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PATH = "/etc/fstab"
CRYPTTAB = "/etc/crypttab"
LONGEST = 64 << 10
"""Bytes of either; the longest ones have a few KiB."""

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "glusterfs", "fuse.sshfs"}
_IN_MEMORY = {"tmpfs", "ramfs", "overlay", "aufs"}
_INITIAL = {"none", "rootfs", "/dev/root"}
_DEVICE = re.compile(r"(UUID|LABEL|PARTUUID|PARTLABEL|ID)=|/dev/")
_NUMBERED = re.compile(
    r"/dev/(?:((?:[shv]|xv)d[a-z]+)(\d*)|((?:nvme\d+n|mmcblk|nbd)\d+)(?:p(\d+))?)"
)


@dataclass(frozen=True, slots=True)
class FstabLine:
    """One line of fstab: device, mount point, type of filesystem, options."""

    spec: str
    point: str
    kind: str
    options: Mapping[str, str]

    @property
    def is_bind(self) -> bool:
        """Whether `spec` is a directory of the guest's own tree."""
        return bool({"bind", "rbind"} & self.options.keys())

    @property
    def is_device(self) -> bool:
        """Whether `spec` names a disk, a part of one, or a dataset of ZFS."""
        is_named = _DEVICE.match(self.spec) is not None or self.kind == "zfs"
        return is_named and not self.is_bind

    @property
    def is_diskless(self) -> bool:
        """Whether the type is one in memory or over a network, or an overlay."""
        return self.kind in _NETWORK | _IN_MEMORY

    @property
    def is_any(self) -> bool:
        """Whether `spec` stands for the root that the kernel was started with, whatever that is."""
        return self.spec in _INITIAL and not self.is_diskless

    @property
    def is_optional(self) -> bool:
        """Whether it has the option noauto."""
        return "noauto" in self.options

    def elsewhere(self) -> str:
        """Say where its files are, of a line that mounts no disk."""
        if self.kind in _NETWORK:
            return f"{self.point} is {self.spec}, reached over a network"
        return f"{self.point} is a {self.kind}, and not on any disk that was recorded"

    def root(self) -> str | None:
        """Return the directory of the filesystem that is mounted.

        "" is the driver's default; None means a subvolume that is given only by its number.
        """
        if (subvolume := self.options.get("subvol")) is not None:
            return posixpath.normpath("/" + subvolume.lstrip("/"))
        if (folder := self.options.get("X-mount.subdir")) is not None:
            return posixpath.normpath("/" + folder.lstrip("/"))
        number = self.options.get("subvolid")
        if number is None:
            return ""
        return "/" if number in {"0", "5"} else None  # 5 is the top level, and 0 its alias


def lines(raw: bytes) -> list[FstabLine]:
    """Return the lines of an fstab; without swap, and of several for one point the last."""
    found: dict[str, FstabLine] = {}
    for fields in _fields(raw):
        if len(fields) < 3 or not fields[1].startswith("/") or fields[2] in {"swap", "ignore"}:
            continue
        spec, point, kind = fields[0], posixpath.normpath(f"/{fields[1].lstrip('/')}"), fields[2]
        options = dict(
            option.partition("=")[::2]
            for option in (fields[3] if len(fields) > 3 else "defaults").split(",")
        )
        found[point] = FstabLine(unquoted(spec), point, kind, options)
    return list(found.values())


def ciphers(raw: bytes) -> dict[str, str]:
    """Return by node below /dev/mapper the device that crypttab makes it from."""
    return {
        f"/dev/mapper/{fields[0]}": unquoted(fields[1])
        for fields in _fields(raw)
        if len(fields) >= 2
    }


def numbered(spec: str) -> tuple[str, int] | None:
    """Split a name such as /dev/sda1 into the disk's and the partition's number, 0 for none.

    None for names that do not depend on the order of a guest's disks.
    """
    found = _NUMBERED.fullmatch(spec)
    if found is None:
        return None
    return found[1] or found[3], int(found[2] or found[4] or 0)


def unquoted(spec: str) -> str:
    """Return a tag without quotes around its value."""
    tag, equals, value = spec.partition("=")
    if equals and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return f"{tag}={value[1:-1]}"
    return spec


def _fields(raw: bytes) -> Iterator[list[str]]:
    for line in raw.split(b"\n"):
        words = line.split()
        if words and not words[0].startswith(b"#"):
            yield [_decoded(word) for word in words]


def _decoded(word: bytes) -> str:
    plain = _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), word)
    return plain.decode("utf-8", "surrogateescape")

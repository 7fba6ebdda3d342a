"""What a qcow2 file says of itself that must be known before QEMU opens it by another name.

QEMU looks for a backing file with a relative name in the folder of the file that names it, and
bytes that come from a socket have no folder. And an external data file would be written to. Source:
QEMU's "The qcow2 image format" (docs/interop/qcow2.txt).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.formats import ImageFormat, format_of_file
from nbdproxy.errors import ImageError

_HEADER = struct.Struct(">4sIQIIQ")
"""Magic, version, place and length of the backing file's name, cluster bits, size."""
_HEADER_3 = struct.Struct(">QQQII")
"""Incompatible, compatible and autoclear features, refcount order, header length."""
_HEADER_3_AT, _LENGTH_2 = 72, 72
_EXTERNAL_DATA, _EXTENDED_L2 = 0x4, 0x10
_ENTRY, _EXTENDED_ENTRY = 8, 16
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_CLUSTER_BITS = range(9, 22)
_PROTOCOL = re.compile(r"[^/]*:")


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands in the header of a qcow2 file.

    size            of the guest's disk in bytes
    cluster         bytes of a cluster
    tables          bytes of L2 tables that a disk of this size can have
    backing         the name of its backing file as it stands there; empty if it has none
    backing_format  what that is said to be; empty if nothing is said
    data_file       the name of its external data file as it stands there; None if it has none
    """

    size: int
    cluster: int
    tables: int
    backing: str
    backing_format: str
    data_file: str | None

    @classmethod
    def of(cls, device: ReadableDevice, path: Path) -> Layout:
        """Read the header of a file; raises ImageError, naming `path`, if it is no qcow2 file's."""
        raw = device.pread(0, min(device.size, 1 << _CLUSTER_BITS.stop - 1))
        try:
            return cls._parsed(raw)
        except (struct.error, ValueError):
            raise ImageError(
                f"{path} has no qcow2 header that can be read; check the path"
            ) from None

    @classmethod
    def _parsed(cls, raw: bytes) -> Layout:
        magic, version, at, length, bits, size = _HEADER.unpack_from(raw)
        if magic != b"QFI\xfb" or version not in {2, 3} or bits not in _CLUSTER_BITS:
            raise ValueError
        features, extensions = 0, _LENGTH_2
        if version > 2:
            features, *_, extensions = _HEADER_3.unpack_from(raw, _HEADER_3_AT)
        texts = _extensions(raw[: at or None], extensions)
        has_data_file = bool(features & _EXTERNAL_DATA)
        return cls(
            size,
            1 << bits,
            (size >> bits) * (_EXTENDED_ENTRY if features & _EXTENDED_L2 else _ENTRY),
            _text(raw[at : at + length]),
            _text(texts.get(_BACKING_FORMAT, b"")),
            _text(texts.get(_DATA_FILE, b"")) if has_data_file else None,
        )

    def backing_node(self, image: Path) -> dict[str, object] | None:
        """Return the backing file as QEMU is to open it; None if it finds it by itself."""
        if not self.backing or self.backing.startswith("/") or _PROTOCOL.match(self.backing):
            return None
        path = image.absolute().parent / self.backing
        form = self.backing_format or str(format_of_file(path) or ImageFormat.RAW)
        return {"driver": form, "file": {"driver": "file", "filename": str(path)}}


def _extensions(raw: bytes, at: int) -> dict[int, bytes]:
    """Return the header extensions by their kind, from `at` on."""
    found: dict[int, bytes] = {}
    while at + _EXTENSION.size <= len(raw):
        kind, length = _EXTENSION.unpack_from(raw, at)
        if not kind:
            break
        at += _EXTENSION.size
        found[kind] = raw[at : at + length]
        at += -(-length // 8) * 8
    return found


def _text(raw: bytes) -> str:
    return raw.decode()

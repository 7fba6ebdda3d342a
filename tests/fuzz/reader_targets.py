"""The readers of what others wrote: only our own errors may come, of any bytes.

A disk is given as patches, because a filesystem is long and mostly empty: u32 block of 512 bytes,
u16 how many bytes, the bytes. Where a checksum would keep all else from being reached it is mended.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import NbdproxyError
from nbdproxy.oracles import manifest
from nbdproxy.oracles.lvm import physical, unread, volumes
from nbdproxy.oracles.mounts import Mount
from nbdproxy.oracles.partitions import look
from nbdproxy.oracles.qcow2 import Qcow2Device
from nbdproxy.oracles.quick import QUICK
from nbdproxy.policy import loader
from nbdproxy.recording.foreign.dm_log_writes import DmLog
from nbdproxy.recording.foreign.importing import disk_size
from nbdproxy.recording.foreign.nbd_trlog import TransactionLog
from nbdproxy.recording.unpack import unpack
from tests.support.packs import seal

DISK = 2 * 1024 * 1024
"""Bytes of a disk that is read."""
_PATCH = struct.Struct("<IH")
_GPT_HEADER = 92
_LVM_SEED = 0xF597A6CF ^ 0xFFFFFFFF


@contextlib.contextmanager
def _file(given: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbdproxy-fuzz-") as name:
        path = Path(name) / "given.toml"
        path.write_bytes(given)
        yield path


def pack(given: bytes) -> None:
    """Unpack a tar archive, sealed as a packed recording is."""
    with _file(seal(given)) as path, contextlib.suppress(NbdproxyError):
        unpack(path, path.with_name("out"))


def policy(given: bytes) -> None:
    """Read a policy file."""
    with _file(given) as path, contextlib.suppress(NbdproxyError):
        loader.read(path)


def manifest_of_files(given: bytes) -> None:
    """Read a manifest, of any program's form."""
    with _file(given) as path, contextlib.suppress(NbdproxyError):
        found = manifest.load(path)
        text = manifest.dump(found)
        assert manifest.parse(text, "again").entries == found.entries


def dm_log(given: bytes) -> None:
    """Read a log of dm-log-writes."""
    with _file(given) as path, contextlib.suppress(NbdproxyError):
        for uncounted in (False, True):
            with contextlib.closing(DmLog(path, uncounted=uncounted)) as log:
                disk_size(log.touches(), None, None)


def trlog(given: bytes) -> None:
    """Read a transaction log of nbd-server."""
    with (
        _file(given) as path,
        contextlib.suppress(NbdproxyError),
        contextlib.closing(TransactionLog(path)) as log,
    ):
        disk_size(log.survey().touches, None, None)


def patches(content: bytes, *, longest: int = 512) -> bytes:
    """The input that makes a disk with this content."""
    found = []
    for at in range(0, len(content), longest):
        part = content[at : at + longest].rstrip(b"\0")
        if part:
            found.append(_PATCH.pack(at // 512, len(part)) + part)
    return b"".join(found)


def disk_of(given: bytes, size: int = DISK) -> bytearray:
    """The disk that an input makes."""
    disk, at = bytearray(size), 0
    while at + _PATCH.size <= len(given):
        block, length = _PATCH.unpack_from(given, at)
        part = given[at + _PATCH.size : at + _PATCH.size + length]
        start = block * 512 % size
        disk[start : start + len(part)] = part[: size - start]
        at += _PATCH.size + length
    return disk


def qcow2(given: bytes) -> None:
    """Read all that a qcow2 file tells, and the beginning of what is in it."""
    with contextlib.suppress(NbdproxyError):
        device = Qcow2Device(MemoryDisk(bytes(disk_of(given))))
        device.pread(0, min(device.size, 65536))
        for _ in zip(range(1000), device.data_extents(0, device.size), strict=False):
            pass


def gpt(given: bytes) -> None:
    """Look for partitions, with a partition table whose checksums are right."""
    disk = disk_of(given)
    for at in (512, DISK - 512):
        (entries, count, size) = struct.unpack_from("<QII", disk, at + 72)
        if disk[at : at + 8] == b"EFI PART" and count * size < DISK and entries < DISK // 512:
            listed = disk[entries * 512 : entries * 512 + count * size]
            struct.pack_into("<I", disk, at + 88, zlib.crc32(listed))
            struct.pack_into("<I", disk, at + 16, 0)
            struct.pack_into("<I", disk, at + 16, zlib.crc32(disk[at : at + _GPT_HEADER]))
    with contextlib.suppress(NbdproxyError):
        look(MemoryDisk(bytes(disk)))


def lvm(given: bytes) -> None:
    """Read a physical volume's text, which is the input, with right checksums around it."""
    disk = bytearray(DISK)
    text = given[:3000] + b"\0"
    area, size = 4096, 65536
    body = bytearray(492)
    body[:16], body[16:20] = b" LVM2 x[5A%r0N*>", b"\1\0\0\0"
    struct.pack_into("<QQ", body, 20, area, size)
    struct.pack_into("<QQII", body, 36, 512, len(text), _lvm_crc(text), 0)
    header = struct.pack("<I", _lvm_crc(bytes(body).ljust(508, b"\0"))) + body
    disk[area : area + len(header)] = header
    disk[area + 512 : area + 512 + len(text)] = text
    places = struct.pack("<QQQQ", 1 << 20, 0, 0, 0) + struct.pack("<QQQQ", area, size, 0, 0)
    rest = struct.pack("<I8s", 32, b"LVM2 001") + b"u" * 32 + struct.pack("<Q", DISK) + places
    rest = rest.ljust(492, b"\0")
    disk[512:1024] = b"LABELONE" + struct.pack("<QI", 1, _lvm_crc(rest)) + rest
    found = physical(MemoryDisk(bytes(disk)))
    assert found is not None
    with contextlib.suppress(NbdproxyError):
        volumes([found])
        unread([found])


def _lvm_crc(data: bytes) -> int:
    return zlib.crc32(data, _LVM_SEED) ^ 0xFFFFFFFF


def ext4(given: bytes) -> None:
    """Examine a filesystem, and read all its files."""
    device = MemoryDisk(bytes(disk_of(given)))
    with contextlib.suppress(NbdproxyError):
        QUICK.examine(device, partition=None, fsck=False)
    with contextlib.suppress(NbdproxyError):
        QUICK.scan(device, "/", mount=Mount())


TARGETS: dict[str, Callable[[bytes], None]] = {
    "pack": pack,
    "policy": policy,
    "manifest": manifest_of_files,
    "dm-log-writes": dm_log,
    "nbd-trlog": trlog,
    "qcow2": qcow2,
    "gpt": gpt,
    "lvm": lvm,
    "ext4": ext4,
}

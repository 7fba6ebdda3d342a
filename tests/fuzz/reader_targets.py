"""The readers of what others wrote: only our own errors may come, of any bytes.

A disk is given as patches, because a filesystem is long and mostly empty: u32 block of 512 bytes,
u16 how many bytes, the bytes; `mutated` changes it as that. Where a checksum would keep all else
from being reached it is mended.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

from xxhash import xxh3_128

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import NbdproxyError
from nbdproxy.oracles import manifest
from nbdproxy.oracles.lvm import in_unknown_groups, logical_volumes, physical_volume
from nbdproxy.oracles.mounts import Mount
from nbdproxy.oracles.partitions import disk_layout
from nbdproxy.oracles.qcow2 import Qcow2Device
from nbdproxy.oracles.quick import QUICK
from nbdproxy.policy import loader
from nbdproxy.recording.foreign.dm_log_writes import DmLog
from nbdproxy.recording.foreign.importing import disk_size
from nbdproxy.recording.foreign.nbd_trlog import TransactionLog
from nbdproxy.recording.unpack import unpack
from tests.fuzz.scratch import folder
from tests.support.packs import contents, seal

DISK = 2 * 1024 * 1024
"""Bytes of a disk that is read."""
JOURNALED = 2 * DISK
"""Bytes of one that has room for a journal."""
_PATCH = struct.Struct("<IH")
_GPT_HEADER = 92
_LVM_SEED = 0xF597A6CF ^ 0xFFFFFFFF


@contextlib.contextmanager
def _file(given: bytes) -> Iterator[Path]:
    with folder() as at:
        path = at / "given.toml"
        path.write_bytes(given)
        yield path


def _mended(archive: bytes) -> bytes:
    """Give each member of a tar archive the digest in the index that it has."""
    try:
        members = contents(archive)
        listed = json.loads(members["pack.json"])["members"]
        pairs = [(one["xxh3_128"].encode(), members[one["name"]]) for one in listed]
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return archive
    for old, content in pairs:
        if len(old) == xxh3_128().digest_size * 2:
            archive = archive.replace(old, xxh3_128(content).hexdigest().encode(), 1)
    return archive


def pack(given: bytes) -> None:
    """Unpack a tar archive, sealed as a packed recording is, with right digests."""
    with _file(seal(_mended(given))) as path, contextlib.suppress(NbdproxyError):
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


def _patches(given: bytes) -> list[tuple[int, bytes]]:
    """The blocks of an input, and what is put there."""
    found, at = [], 0
    while at + _PATCH.size <= len(given):
        block, length = _PATCH.unpack_from(given, at)
        at += _PATCH.size
        found.append((block, given[at : at + length]))
        at += length
    return found


class _Given(MemoryDisk):
    """The disk that an input makes, in the one buffer for all: a new one would take the most time.

    It is used before the next one is made.
    """

    _buffer = bytearray(JOURNALED)
    _used: ClassVar[list[slice]] = []

    def __init__(self, given: bytes, size: int = DISK) -> None:
        self._bytes, self.size = self._buffer, size
        for place in self._used:
            self._bytes[place] = bytes(place.stop - place.start)
        self._used.clear()
        for block, part in _patches(given):
            self.put(block * 512 % size, part)

    def put(self, start: int, part: bytes) -> None:
        place = slice(start, min(start + len(part), self.size))
        self._used.append(place)
        self._bytes[place] = part[: self.size - start]


def mutated(given: bytes, longest: int, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """Change a disk: a number of some width, a block, where a block is, or any bytes of one.

    `mutate` changes bytes, and makes them no longer than it is told.
    """
    rng = random.Random(seed)
    parts = _patches(given)
    if not parts or not rng.randrange(16):
        return mutate(given, longest)
    at = rng.randrange(len(parts))
    block, part = parts[at]
    kind = rng.randrange(8)
    if kind < 5:
        width = rng.choice([1, 2, 4, 8])
        raw = bytearray(part.ljust(512, b"\0"))
        place = rng.randrange(0, len(raw) - width + 1, rng.choice([1, width]))
        order: Literal["little", "big"] = "little" if rng.randrange(2) else "big"
        old = int.from_bytes(raw[place : place + width], order)
        number = rng.choice([old, old + 1, old - 1, 2 * old, old ^ 1 << rng.randrange(8 * width)])
        number = rng.choice([number, rng.randrange(64), block, 2 ** (8 * width - 1), -1, 0])
        raw[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, order)
        parts[at] = block, bytes(raw).rstrip(b"\0")
    elif kind == 5:
        parts.append((rng.choice(parts)[0] + rng.randrange(-2, 3) & 0xFFFFFFFF, part))
    elif kind == 6:
        parts[at] = block, mutate(part, 1024)
    else:
        del parts[at]
    return b"".join(_PATCH.pack(block, len(part)) + part for block, part in parts)[:longest]


def qcow2(given: bytes) -> None:
    """Read all that a qcow2 file tells, and the beginning of what is in it."""
    with contextlib.suppress(NbdproxyError):
        device = Qcow2Device(_Given(given))
        device.pread(0, min(device.size, 65536))
        for _ in zip(range(1000), device.data_extents(0, device.size), strict=False):
            pass


def gpt(given: bytes) -> None:
    """Look for partitions, with a partition table whose checksums are right."""
    disk = _Given(given)
    for at in (512, DISK - 512):
        header = bytearray(disk.pread(at, _GPT_HEADER))
        (entries, count, size) = struct.unpack_from("<QII", header, 72)
        if header[:8] == b"EFI PART" and count * size < DISK and entries < DISK // 512:
            listed = disk.pread(entries * 512, count * size)
            struct.pack_into("<I", header, 88, zlib.crc32(listed))
            struct.pack_into("<I", header, 16, 0)
            struct.pack_into("<I", header, 16, zlib.crc32(header))
            disk.put(at, bytes(header))
    with contextlib.suppress(NbdproxyError):
        disk_layout(disk)


def lvm(given: bytes) -> None:
    """Read a physical volume's text, which is the input, with right checksums around it."""
    text = given[:3000] + b"\0"
    area, size = 4096, 65536
    body = bytearray(492)
    body[:16], body[16:20] = b" LVM2 x[5A%r0N*>", b"\1\0\0\0"
    struct.pack_into("<QQ", body, 20, area, size)
    struct.pack_into("<QQII", body, 36, 512, len(text), _lvm_crc(text), 0)
    header = struct.pack("<I", _lvm_crc(bytes(body).ljust(508, b"\0"))) + body
    places = struct.pack("<QQQQ", 1 << 20, 0, 0, 0) + struct.pack("<QQQQ", area, size, 0, 0)
    rest = struct.pack("<I8s", 32, b"LVM2 001") + b"u" * 32 + struct.pack("<Q", DISK) + places
    rest = rest.ljust(492, b"\0")
    disk = _Given(b"")
    disk.put(512, b"LABELONE" + struct.pack("<QI", 1, _lvm_crc(rest)) + rest)
    disk.put(area, header)
    disk.put(area + 512, text)
    found = physical_volume(disk)
    assert found is not None
    with contextlib.suppress(NbdproxyError):
        logical_volumes([found])
        in_unknown_groups([found])


def _lvm_crc(data: bytes) -> int:
    return zlib.crc32(data, _LVM_SEED) ^ 0xFFFFFFFF


def ext4(given: bytes) -> None:
    """Examine a filesystem, and read all its files."""
    device = _Given(given, JOURNALED)
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

"""A packed recording (`.nbdpack`), version 1. This docstring is its specification.

One file that holds a recording and what of the image is needed to rebuild its crash states:

    frame        one zstd frame (RFC 8878) with a content checksum and a window of at most 128 MiB;
                 its content is the tar archive below
    trailer      24 bytes, for zstd a skippable frame: u32 0x184D2A5E, u32 16, both little-endian,
                 and the xxh3-128 of all bytes before the trailer, big-endian

`zstd -d` and `tar --zstd -x` read it as well; they do not check what `unpack` checks.

The tar archive (ustar headers, a size from 8 GiB on in GNU's base-256 form) has regular files
only, mode 0600, owner 0 without a name, time 0. It ends with two blocks of zeroes and nothing
behind them. Its members, in this order:

    pack.json    the index, below
    events, data, events.tail, data.tail
                 the recording's files as they are (`nbdproxy.recording.format`); a tail, of at
                 most 256 MiB, only if there is one
    base         only if a part of the disk as it was is not in the recording: chunks, one behind
                 the other, each a little-endian u64 offset and u64 length in bytes and then that
                 many bytes. Offsets ascend, chunks do not overlap, none is empty. Together they
                 are what was not a hole at the start and was not saved in the recording, without
                 blocks of 64 KiB that are all zero; what no chunk names and the recording has
                 not saved is zero.
    files.sha256 a manifest, if one was added
    explore.db   a database of `nbdproxy explore`, if one was added

The index is a JSON object without line breaks, of at most 64 KiB:

    version      1
    name         the name of the recording's folder
    program      name and version of the packer
    size         the disk's, in bytes
    events       how many events could be read
    members      for each of the others, in order: {"name", "size" in bytes, "xxh3_128" as 32 hex
                 digits}

Nothing in the file depends on when, where or by whom it was packed: the same recording, packed
again by the same programs, gives the same bytes.

Unpacked, a recording is a folder with these files; `base` there is a sparse file of the disk's
size with each chunk at its offset, and `pack.json` tells that it is whole.

Not covered: the digests find damage, they do not tell who made a file.
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nbdproxy.errors import RecordingError
from nbdproxy.private import open_plain
from nbdproxy.recording.format import (
    TAIL_MAX,
    base_path,
    data_path,
    events_path,
    index_path,
)
from nbdproxy.recording.stream import tail_path

VERSION = 1
INDEX_MAX = 64 * 1024
"""Bytes of an index: far more than eight members need."""
WINDOW_LOG = 27
"""What `zstd -d` accepts unasked, and far enough to find a block's older versions."""
CHUNK = struct.Struct("<QQ")
TRAILER = struct.Struct("<II16s")
TRAILER_MAGIC = 0x184D2A5E
DIGEST_SIZE = 16
BLOCK = 512
END = bytes(2 * BLOCK)

FILES, VERDICTS = "files.sha256", "explore.db"
_HERE = Path()
STREAMS = tuple(
    path.name
    for path in (
        events_path(_HERE),
        data_path(_HERE),
        tail_path(events_path(_HERE)),
        tail_path(data_path(_HERE)),
    )
)
NEEDED, TAILS = STREAMS[:2], STREAMS[2:]
BASE = base_path(_HERE).name
INDEX = index_path(_HERE).name
MEMBERS = (*STREAMS, BASE, FILES, VERDICTS)
"""All names that a member may have, in their order."""

PackProgress = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes of how many are done; of 0 if that is not known."""


@dataclass(frozen=True, slots=True)
class PackMember:
    """A member of the archive: its name, its bytes, and the xxh3-128 of them in hex."""

    name: str
    size: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class PackIndex:
    """What a packed recording says of itself; see the module."""

    name: str
    program: str
    size: int
    events: int
    members: tuple[PackMember, ...]

    def dump(self) -> bytes:
        """Return the JSON text of `pack.json`."""
        text = json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":"))
        return text.encode("ascii")

    @classmethod
    def parse(cls, text: bytes, where: Path) -> PackIndex:
        """Read `pack.json`; raises RecordingError, which names `where`, if it is not one."""
        try:
            fields = json.loads(text)
            version = int(fields.pop("version"))
            if version == VERSION:
                return _checked(fields)
        except (ValueError, OverflowError, TypeError, KeyError, AttributeError, RecursionError):
            raise RecordingError(
                f"{where} has an index that cannot be understood; it was made by another program, "
                "or damaged: ask for it to be packed again"
            ) from None
        raise RecordingError(
            f"{where} has format version {version}, and this nbdproxy reads {VERSION}; "
            "use the nbdproxy that packed it"
        )


def _checked(fields: dict[str, Any]) -> PackIndex:
    """Return the index that the fields are; raises ValueError, KeyError or TypeError if none."""
    members = tuple(PackMember(**member) for member in fields.pop("members"))
    index = PackIndex(members=members, **fields)
    names = [member.name for member in members]
    texts = [index.name, index.program, *names, *(member.xxh3_128 for member in members)]
    numbers = [index.size, index.events, *(member.size for member in members)]
    fine = (
        all(type(text) is str for text in texts)
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and names == [name for name in MEMBERS if name in names]
        and set(NEEDED) <= set(names)
        and all(member.size <= TAIL_MAX for member in members if member.name in TAILS)
    )
    if not fine:
        raise ValueError(fields)
    return index


def load_index(folder: Path) -> PackIndex:
    """Read the index of an unpacked recording; raises RecordingError if it is not there."""
    path = index_path(folder)
    try:
        with open(open_plain(path), "rb") as file:  # noqa: PTH123 - a descriptor
            text = file.read(INDEX_MAX + 1)
    except OSError as error:
        raise RecordingError(
            f"{path} cannot be read ({error.strerror}), and without it {base_path(folder)} cannot "
            "be trusted; unpack the recording again, or name its image with --base IMAGE"
        ) from None
    return PackIndex.parse(text, path)


def header(name: str, size: int) -> bytes:
    """Return the tar header of a member: one block, whatever the size."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def padding(size: int) -> bytes:
    """Return the zeroes that follow a member of so many bytes."""
    return bytes(-size % BLOCK)

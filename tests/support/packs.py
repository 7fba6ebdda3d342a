"""Packed recordings, made by hand: archives sealed as the specification says, with own numbers."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

from xxhash import xxh3_128
from zstandard import ZstdCompressor, ZstdDecompressor

TRAILER = 24


def seal(archive: bytes) -> bytes:
    """Make a packed recording of a tar archive."""
    return seal_frame(ZstdCompressor(write_checksum=True).compress(archive))


def seal_frame(frame: bytes) -> bytes:
    """Put the trailer behind a frame."""
    return frame + struct.pack("<II", 0x184D2A5E, 16) + xxh3_128(frame).digest()


def unseal(content: bytes) -> bytes:
    """Return the tar archive in a packed recording."""
    return ZstdDecompressor().decompressobj().decompress(content[:-TRAILER])


def entry(name: str, content: bytes = b"", **other: Any) -> bytes:
    """A member: header, content, padding; `other` are fields of the header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o600
    for field, value in other.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


def contents(archive: bytes) -> dict[str, bytes]:
    """Name and content of each member, as the standard library reads them."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = {}
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            found[info.name] = file.read()
        return found


def index_of(members: dict[str, bytes], /, **other: Any) -> bytes:
    """A right index of these members; `other` are its facts."""
    listed = [
        {"name": name, "size": len(content), "xxh3_128": xxh3_128(content).hexdigest()}
        for name, content in members.items()
    ]
    facts = {"version": 1, "name": "run", "program": "x", "members": listed}
    return json.dumps(facts | other).encode()


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())

"""Unpacks a packed recording; `packed` specifies the form.

The file is checked as a whole before anything of it is used, and each member against the index as
it is written. A header that is not the one that the index calls for is refused, so no other name,
no link and no device can come out, and no more bytes than the index says. Everything is written
into a new folder that gets its name when all is right and on the disk, and is removed again if
anything is not. Folder and files are their owner's alone (0700, 0600).

Not covered: an index that truthfully promises more than the disk has room for; that is an error
when the disk is full.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_128
from zstandard import ZstdDecompressor, ZstdError

from nbdproxy.errors import NbdproxyError, RecordingError
from nbdproxy.private import NEW, New, new_folder
from nbdproxy.recording.packed import (
    BASE,
    BLOCK,
    CHUNK,
    DIGEST_SIZE,
    END,
    INDEX,
    INDEX_MAX,
    TRAILER,
    TRAILER_MAGIC,
    WINDOW_LOG,
    PackIndex,
    PackMember,
    PackProgress,
    padding,
)
from nbdproxy.recording.reader import Recording

_PART = 1024 * 1024
_FRAME_MAGIC = bytes.fromhex("28b52ffd")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was unpacked, the folder it is in, and what its recorder or packer had lost, if so."""

    index: PackIndex
    folder: Path
    missing: str | None


def unpack(
    source: Path,
    target: Path | None = None,
    *,
    progress: PackProgress = lambda _what, _done, _total: None,
) -> Unpacked:
    """Unpack the file `source` into the new folder `target`.

    Without `target` it is the recording's name, in the current folder. Raises RecordingError, and
    leaves nothing behind, if the file is damaged, or not what `packed` specifies, or if the folder
    exists or cannot be written.
    """
    if source.is_dir():
        raise RecordingError(
            f"{source} is a folder: recordings are used as they are, and only one packed to a file "
            f"is unpacked"
        )
    try:
        with source.open("rb") as file:
            length = _check_seal(source, file, progress)
            file.seek(0)
            archive = _Archive(source, file, length)
            text = archive.index()
            index = PackIndex.parse(text, source)
            target = target or _folder_of(index, source)
            if os.path.lexists(target):
                raise RecordingError(f"{target} exists; name a new folder with -o DIR")
            missing = _unpack(archive, index, text, target, progress)
    except NbdproxyError:
        raise
    except OSError as error:
        raise RecordingError(f"{source} cannot be read: {error.strerror}") from None
    return Unpacked(index, target, missing)


def _check_seal(source: Path, file: BinaryIO, progress: PackProgress) -> int:
    """Return the length of the frame, all of whose bytes are as they were written."""
    length = file.seek(0, os.SEEK_END) - TRAILER.size
    file.seek(0)
    if file.read(len(_FRAME_MAGIC)) != _FRAME_MAGIC:
        raise RecordingError(f"{source} is not a packed recording; check the path")
    file.seek(max(length, 0))
    trailer = file.read()
    if len(trailer) != TRAILER.size:
        raise _cut_off(source)
    magic, size, expected = TRAILER.unpack(trailer)
    if (magic, size) != (TRAILER_MAGIC, DIGEST_SIZE):
        raise _cut_off(source)
    file.seek(0)
    digest, left = xxh3_128(), length
    while left and (part := file.read(min(_PART, left))):
        digest.update(part)
        left -= len(part)
        progress("checking", length - left, length)
    if digest.digest() != expected:
        raise RecordingError(f"{source} is damaged; copy it again from where it came from")
    return length


def _cut_off(source: Path) -> RecordingError:
    return RecordingError(
        f"{source} is damaged or was cut off; copy it again from where it came from"
    )


def _folder_of(index: PackIndex, source: Path) -> Path:
    """Return the folder that an index names, if that is a plain name."""
    name = index.name
    if not name.isprintable() or "/" in name or name in {"", ".", ".."}:
        raise RecordingError(
            f"{source} names a folder {name!r}, which is no good name; name one with -o DIR"
        )
    return Path(name)


class _Archive:
    """The tar archive in a frame of `length` bytes, read from front to end.

    Everything raises RecordingError if the archive is not as `packed` specifies it.
    """

    def __init__(self, source: Path, file: BinaryIO, length: int) -> None:
        self.source = source
        # What is behind the frame must not be taken for a part of it.
        bounded = _Bounded(file, length)
        decompressor = ZstdDecompressor(max_window_size=1 << WINDOW_LOG)
        self._content = decompressor.stream_reader(
            bounded,  # type: ignore[arg-type]
            # So that a second frame is seen, and refused as more content.
            read_across_frames=True,
            closefd=False,
        )

    def wrong(self, what: str) -> RecordingError:
        """Return the error of an archive that is not what it should be."""
        return RecordingError(
            f"{self.source} {what}; it was not made by nbdproxy, so ask for it to be packed again"
        )

    def read(self, count: int) -> bytes:
        """Return exactly that many bytes of the archive."""
        parts = []
        try:
            while count:
                part = self._content.read(count)
                if not part:
                    raise self.wrong("ends too early")
                parts.append(part)
                count -= len(part)
        except ZstdError:
            raise self.wrong("cannot be decompressed") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def index(self) -> bytes:
        """Return the text of the first member, which is the index."""
        size = self._header(INDEX)
        if not 0 <= size <= INDEX_MAX:
            raise self.wrong(f"has an index of {size} bytes")
        text = self.read(size)
        self.pad(size)
        return text

    def enter(self, member: PackMember) -> None:
        """Read a member's header; it must be the one that the index calls for."""
        size = self._header(member.name)
        if size != member.size:
            raise self.wrong(f"has {size} bytes of {member.name}, and its index says {member.size}")

    def _header(self, name: str) -> int:
        """Read the header of the regular file `name`; return its size."""
        try:
            info = tarfile.TarInfo.frombuf(self.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise self.wrong(f"has no {name}") from None
        if info.name != name:
            raise self.wrong(f"has a member {info.name!r} where {name} should be")
        if info.type != tarfile.REGTYPE or info.linkname:
            raise self.wrong(f"has a {name} that is not a regular file")
        return info.size

    def pad(self, size: int) -> None:
        """Read what follows a member of so many bytes."""
        if self.read(-size % BLOCK) != padding(size):
            raise self.wrong("has something between its members")

    def end(self) -> None:
        """Read the end of the archive, behind which nothing may be."""
        if self.read(len(END)) != END:
            raise self.wrong("has more members than its index")
        try:
            more = self._content.read(1)
        except ZstdError:
            raise self.wrong("cannot be decompressed") from None
        if more:
            raise self.wrong("goes on behind its end")


class _Bounded:
    """The first `length` bytes of a file."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._left = length

    def read(self, count: int) -> bytes:
        """Return at most that many bytes; none at the end."""
        part = self._file.read(min(count, self._left))
        self._left -= len(part)
        return part


def _unpack(
    archive: _Archive, index: PackIndex, text: bytes, target: Path, progress: PackProgress
) -> str | None:
    """Write the members into a new folder; whatever happens, nothing else is left.

    Returns what is missing of the recording.
    """
    try:
        with new_folder(target) as made:
            with _new(made, INDEX) as file:
                _write(file, 0, text)
            total, done = sum(member.size for member in index.members), 0
            for member in index.members:
                archive.enter(member)
                with _new(made, member.name) as file:
                    content = _Content(archive, member, progress, done, total)
                    if member.name == BASE:
                        _fill_base(archive, content, file, index.size)
                    else:
                        _fill(content, file)
                content.check()
                archive.pad(member.size)
                done += member.size
            archive.end()
            missing = _check_facts(archive, index, made.path)
            made.finish()
            return missing
    except NbdproxyError:
        raise
    except OSError as error:
        raise RecordingError(f"{target} cannot be written: {error.strerror}") from None


@contextmanager
def _new(made: New, name: str) -> Iterator[BinaryIO]:
    """Have a file of the new folder, which is on the disk afterwards."""
    fd = os.open(name, os.O_RDWR | NEW, 0o600, dir_fd=made.fd)
    with open(fd, "r+b", buffering=0) as file:  # noqa: PTH123 - a descriptor
        yield file
        os.fsync(fd)


class _Content:
    """A member's bytes, read from front to end; `done` of `total` bytes came before."""

    def __init__(
        self, archive: _Archive, member: PackMember, progress: PackProgress, done: int, total: int
    ) -> None:
        self._archive = archive
        self._member = member
        self._digest = xxh3_128()
        self._progress = progress
        self._done = done
        self._total = total
        self.left = member.size

    def read(self, count: int) -> bytes:
        """Return that many bytes, of which the member must have so many."""
        if count > self.left:
            raise self._archive.wrong(f"has a {self._member.name} that ends too early")
        data = self._archive.read(count)
        self._digest.update(data)
        self.left -= count
        self._progress("unpacking", self._done + self._member.size - self.left, self._total)
        return data

    def check(self) -> None:
        """Raise RecordingError if what was read is not what the index says."""
        if self._digest.hexdigest() != self._member.xxh3_128:
            raise self._archive.wrong(f"has a {self._member.name} that its index does not know")


def _fill(content: _Content, file: BinaryIO) -> None:
    """Write a member as it is, with holes where it is zero: a tail is mostly that."""
    size = content.left
    while content.left:
        at = size - content.left
        data = content.read(min(_PART, content.left))
        if data.count(0) != len(data):
            _write(file, at, data)
    file.truncate(size)


def _fill_base(archive: _Archive, content: _Content, file: BinaryIO, size: int) -> None:
    """Write the chunks of a base of `size` bytes, each at its place."""
    end = 0
    while content.left:
        offset, length = CHUNK.unpack(content.read(CHUNK.size))
        if not length or offset < end or offset + length > size:
            raise archive.wrong("has a base with a chunk that cannot be")
        end = offset + length
        while offset < end:
            data = content.read(min(_PART, end - offset))
            _write(file, offset, data)
            offset += len(data)
    file.truncate(size)


def _write(file: BinaryIO, offset: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file.fileno(), rest, offset)
        rest, offset = rest[count:], offset + count


def _check_facts(archive: _Archive, index: PackIndex, folder: Path) -> str | None:
    """Refuse a recording that is not the one that the index is of, or that no recorder wrote.

    Returns what is missing of it.
    """
    try:
        with Recording(folder) as recording:
            facts, missing = (recording.size, recording.events), recording.missing
    except RecordingError:
        raise RecordingError(
            f"{archive.source} holds no recording that this nbdproxy can read; unpack it with the "
            "version that packed it, or ask for it to be packed again"
        ) from None
    if facts != (index.size, index.events):
        raise archive.wrong("has an index of another recording")
    return missing

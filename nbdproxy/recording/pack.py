"""Packs a recording, and what it needs of its image, into one file; `packed` specifies the form.

Everything is read twice: once to know sizes and digests, which stand in front, and once to pack
it. What is not the same both times is an error, so a recording that is still being written or an
image that is being changed never makes a wrong file. Memory does not grow with the recording. The
file is its owner's alone (0600), and on the disk when it has its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xxhash import xxh3_128
from zstandard import ZstdCompressionParameters, ZstdCompressor

from nbdproxy import __version__
from nbdproxy.errors import ImageError, NbdproxyError, RecordingError
from nbdproxy.extents import Extent
from nbdproxy.private import new_file, open_plain
from nbdproxy.recording.packed import (
    BASE,
    CHUNK,
    DIGEST_SIZE,
    END,
    FILES,
    INDEX,
    MEMBERS,
    NEEDED,
    STREAMS,
    TRAILER,
    TRAILER_MAGIC,
    VERDICTS,
    WINDOW_LOG,
    PackIndex,
    PackMember,
    PackProgress,
    header,
    padding,
)
from nbdproxy.recording.reader import Recording

_PART = 1024 * 1024
_GRAIN = 64 * 1024
_ZEROES = bytes(_GRAIN)
_LEVEL = 3
"""Higher levels take several times as long and save a few percent of a disk's content."""

_Parts = Callable[[], Iterator[bytes]]
"""Reads a member from its beginning, in parts."""


class Readable(Protocol):
    """What a base is read from: any disk of `nbdproxy.disks`."""

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        ...


@dataclass(frozen=True, slots=True)
class PackedBase:
    """The disk as it was at the start, and which parts of it are not in the recording.

    `extents` ascend and are disjoint, in bytes.
    """

    disk: Readable
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """What was packed: the index, and the file's size in bytes."""

    index: PackIndex
    size: int


def pack(
    recording: Recording,
    target: Path,
    *,
    base: PackedBase | None = None,
    extras: Mapping[str, Path] | None = None,
    confirm: Callable[[], object] = lambda: None,
    progress: PackProgress = lambda _what, _done, _total: None,
) -> Packed:
    """Write a recording to the new file `target`, which exists under that name when it is whole.

    `base` is None if the recording needs no image. `extras` names the files of the members
    files.sha256 and explore.db; one that stands in the recording's folder need not be named.
    `confirm` is called when all has been read, and raises if that cannot be trusted.

    Raises RecordingError if `target` exists or cannot be written, or if the recording cannot be
    read or is being changed; ImageError if the base cannot be read.
    """
    if os.path.lexists(target):
        raise RecordingError(f"{target} exists; name a new file, or remove it first")
    sources = _sources(recording.path, base, extras or {})
    members = _survey(sources, progress)
    index = PackIndex(
        name=recording.path.resolve().name,
        program=f"nbdproxy {__version__}",
        size=recording.size,
        events=recording.events,
        members=members,
    )
    try:
        with new_file(target) as made:
            with open(made.fd, "wb", closefd=False) as file:
                _write(_Sealed(file.write), index, sources, progress)
                _check_still(recording)
                confirm()
                size = file.tell()
            made.finish()
    except NbdproxyError:
        raise
    except OSError as error:
        raise RecordingError(f"{target} cannot be written: {error.strerror}") from None
    return Packed(index, size)


def _check_still(recording: Recording) -> None:
    """Refuse a recording that has grown since it was opened.

    What it saved since then was not saved yet when `base` was chosen, and is changed in the image.
    """
    if recording.ending is not None:
        return
    with Recording(recording.path) as now:
        if now.events != recording.events:
            raise RecordingError(
                f"{recording.path} is still being recorded; end what records it, and pack again"
            )


def _sources(run: Path, base: PackedBase | None, extras: Mapping[str, Path]) -> dict[str, _Parts]:
    """Return where each member is read from, in their order."""
    files = {name: run / name for name in STREAMS if name in NEEDED or (run / name).exists()}
    for name in (FILES, VERDICTS):
        path = extras.get(name, run / name)
        if name in extras or path.exists():
            files[name] = path
    sources = {name: _reader_of(path, ours=name not in extras) for name, path in files.items()}
    if base is not None:
        sources[BASE] = lambda: _chunks(base)
    return {name: sources[name] for name in MEMBERS if name in sources}


def _reader_of(path: Path, *, ours: bool) -> _Parts:
    """Return how a file is read; one of `ours` is in the recording's folder, and is no link."""

    def read() -> Iterator[bytes]:
        try:
            fd = open_plain(path) if ours else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
                while part := file.read(_PART):
                    yield part
        except OSError as error:
            raise RecordingError(
                f"{path} cannot be read ({error.strerror}); check that it is there and pack again"
            ) from None

    return read


def _chunks(base: PackedBase) -> Iterator[bytes]:
    """Yield the chunks of the member `base`."""
    for extent in base.extents:
        at = extent.offset
        while at < extent.end:
            # Cut where parts of the disk begin, so that a block is whole wherever it can be.
            stop = min(extent.end, at - at % _PART + _PART)
            data = _pread(base.disk, at, stop - at)
            for start, end in _not_zero(data, at):
                yield CHUNK.pack(start, end - start) + data[start - at : end - at]
            at = stop


def _pread(disk: Readable, offset: int, length: int) -> bytes:
    try:
        return disk.pread(offset, length)
    except NbdproxyError:
        raise
    except OSError as error:
        raise ImageError(
            f"the image cannot be read at byte {offset} ({error.strerror}); name a copy that can "
            "with --base IMAGE"
        ) from None


def _not_zero(data: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of blocks that are not all zero; `offset` is where `data` begins."""
    at, end, run = offset, offset + len(data), offset
    while at < end:
        stop = min(end, at - at % _GRAIN + _GRAIN)
        if data[at - offset : stop - offset] == _ZEROES[: stop - at]:
            if run < at:
                yield run, at
            run = stop
        at = stop
    if run < end:
        yield run, end


def _survey(sources: Mapping[str, _Parts], progress: PackProgress) -> tuple[PackMember, ...]:
    """Return sizes and digests of all members."""
    done, members = 0, []
    for name, parts in sources.items():
        size, digest = 0, xxh3_128()
        for part in parts():
            size += len(part)
            digest.update(part)
            done += len(part)
            progress("reading", done, 0)
        members.append(PackMember(name, size, digest.hexdigest()))
    return tuple(members)


class _Sealed:
    """Passes on what is written, and knows the digest of all that was."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        self._write = write
        self._digest = xxh3_128()

    def write(self, data: bytes) -> int:
        """Write; returns how many bytes."""
        self._digest.update(data)
        return self._write(data)

    def seal(self) -> None:
        """Write the trailer."""
        self._write(TRAILER.pack(TRAILER_MAGIC, DIGEST_SIZE, self._digest.digest()))


def _write(
    file: _Sealed, index: PackIndex, sources: Mapping[str, _Parts], progress: PackProgress
) -> None:
    parameters = ZstdCompressionParameters.from_level(
        _LEVEL,
        # A guest writes many a block again, hardly changed: the journal, an inode table.
        enable_ldm=True,
        window_log=WINDOW_LOG,
        write_checksum=True,
        write_content_size=False,
    )
    total, done = sum(member.size for member in index.members), 0
    compressor = ZstdCompressor(compression_params=parameters)
    with compressor.stream_writer(file, closefd=False) as out:  # type: ignore[arg-type]
        for block in _member(INDEX, index.dump()):
            out.write(block)
        for member in index.members:
            out.write(header(member.name, member.size))
            for part in _again(member, sources[member.name]()):
                out.write(part)
                done += len(part)
                progress("packing", done, total)
            out.write(padding(member.size))
        out.write(END)
    file.seal()


def _member(name: str, content: bytes) -> Iterable[bytes]:
    return header(name, len(content)), content, padding(len(content))


def _again(member: PackMember, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield a member's parts; raises RecordingError if they are not what they were."""
    size, digest = 0, xxh3_128()
    for part in parts:
        size += len(part)
        digest.update(part)
        yield part
    if (size, digest.hexdigest()) != (member.size, member.xxh3_128):
        raise RecordingError(
            f"{member.name} was changed while it was packed; end what writes to it, and pack again"
        )

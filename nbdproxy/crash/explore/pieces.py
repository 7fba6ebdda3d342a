"""Hands a recording over to a machine that cannot see it, in content-addressed pieces.

A `Snapshot` lists what the recording consists of: its events, its payloads, and of its image what
is not in the recording. All that stands in pieces of at most 8 MiB, each named by its xxh3-128. A
`PieceSource` reads them at one end; at the other a `PieceStore` keeps them, asks only for those
that it lacks, and puts the recording together. A recording that is still being written, or whose
writer was killed, arrives as what it was when the source was opened.

Guarantees: no piece is used whose content is not what its name says, neither on arrival nor later;
and a run that is there is whole. Not covered: somebody who makes pieces with the same xxh3-128 on
purpose; whoever can reach the store can run code there anyway.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_hexdigest

from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.errors import RecordingError
from nbdproxy.private import open_folder
from nbdproxy.recording.format import NONE, SLOT_SIZE, SLOTS, SlotKind, data_path, events_path
from nbdproxy.recording.stream import StreamReader

PIECE_MAX = 8 * 1024 * 1024
"""Bytes; a piece is held in memory at both ends and on the way, and Dask warns from 10 MB on."""

IMAGE = "base"
"""The file of a snapshot that stands for the image."""

_Read = Callable[[int, int], bytes]
"""Reads so many bytes at an offset."""


@dataclass(frozen=True, slots=True)
class FilePiece:
    """Where a piece belongs in its file, in bytes, and its name."""

    offset: int
    length: int
    digest: str


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A file: its size in bytes, and its pieces in ascending order; between them are zeroes."""

    name: str
    size: int
    pieces: tuple[FilePiece, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a recording consists of; the same content gives the same `digest`."""

    files: tuple[SnapshotFile, ...]

    @property
    def digest(self) -> str:
        """The name of the whole."""
        return xxh3_128_hexdigest(repr(self.files).encode())

    @property
    def has_image(self) -> bool:
        """Whether a part of the image is in it."""
        return any(file.name == IMAGE for file in self.files)

    def pieces(self) -> dict[str, int]:
        """Return the digests of all pieces, each once, with their lengths."""
        return {piece.digest: piece.length for file in self.files for piece in file.pieces}


class PieceSource:
    """The pieces of a recording, read from its files as they are asked for.

    All is read once at the beginning. `source` is the caller's, and has to stay open. Raises
    RecordingError if files cannot be read, and ImageError as `RecordedSource.base` does.
    """

    def __init__(self, source: RecordedSource) -> None:
        self._path = source.path
        self._where: dict[str, tuple[_Read, FilePiece]] = {}
        self._stack = ExitStack()
        try:
            self.snapshot = Snapshot(tuple(self._survey(source)))
        except OSError as error:
            self.close()
            raise RecordingError(
                f"{source.path} cannot be read ({error.strerror}); check the disk that it is on"
            ) from None
        except BaseException:
            self.close()
            raise

    def _survey(self, source: RecordedSource) -> Iterator[SnapshotFile]:
        size = source.events * SLOT_SIZE
        read = self._open(events_path(source.path))
        yield self._file("events", size, read, _grid(0, size))
        # What is behind the last payload may be garbage that a killed writer left.
        size = max((_payload_end(read(*place)) for place in _grid(0, size)), default=0)
        yield self._file("data", size, self._open(data_path(source.path)), _grid(0, size))
        spans = _spans(source)
        if spans:
            base = source.base()
            self._stack.callback(base.close)
            yield self._file(IMAGE, source.size, base.pread, spans)

    def _open(self, path: Path) -> _Read:
        reader = StreamReader(path)
        self._stack.callback(reader.close)
        return partial(_read, reader)

    def _file(
        self, name: str, size: int, read: _Read, places: Iterable[tuple[int, int]]
    ) -> SnapshotFile:
        pieces = []
        for offset, length in places:
            data = read(offset, length)
            if data.count(0) == length:
                continue
            piece = FilePiece(offset, length, xxh3_128_hexdigest(data))
            self._where.setdefault(piece.digest, (read, piece))
            pieces.append(piece)
        return SnapshotFile(name, size, tuple(pieces))

    def read(self, digest: str) -> bytes:
        """Return a piece; raises RecordingError if what it was read from is not the same now."""
        read, piece = self._where[digest]
        data = read(piece.offset, piece.length)
        if xxh3_128_hexdigest(data) != digest:
            raise RecordingError(
                f"{self._path} or its image was changed while it was handed over; "
                "end what writes to it, and explore again"
            )
        return data

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def _read(reader: StreamReader, offset: int, length: int) -> bytes:
    data = bytearray(length)
    # What is lacking reads as zeroes, and then the digest is not the same any more.
    reader.read_into(offset, memoryview(data))
    return bytes(data)


def _grid(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the pieces of [start, end), cut where every file is cut."""
    while start < end:
        stop = min(end, start - start % PIECE_MAX + PIECE_MAX)
        yield start, stop - start
        start = stop


def _payload_end(slots: bytes) -> int:
    found = np.frombuffer(slots, SLOTS)
    found = found[(found["kind"] != SlotKind.COMPLETED) & (found["position"] != NONE)]
    return int((found["position"] + found["length"]).max(initial=0))


def _spans(source: RecordedSource) -> list[tuple[int, int]]:
    """Return the parts of the image that are needed; few, though there is more between them."""
    spans: list[tuple[int, int]] = []
    for extent in source.image_parts():
        for offset, length in _grid(extent.offset, extent.end):
            if spans and spans[-1][0] // PIECE_MAX == offset // PIECE_MAX:
                spans[-1] = spans[-1][0], offset + length - spans[-1][0]
            else:
                spans.append((offset, length))
    return spans


class PieceStore:
    """A folder of pieces and of the runs made from them, for any number of processes at a time.

    `scratch` is a folder on the same filesystem, for what is not whole yet. All methods raise
    OSError if the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._pieces, self._runs = folder / "pieces", folder / "runs"
        self._scratch = scratch
        # A disk's content is nobody else's business.
        os.close(open_folder(folder, sticky=False, make=True))
        for path in (self._pieces, self._runs, scratch):
            path.mkdir(exist_ok=True)

    def lacking(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Return the names of the pieces that have to be put here before `run` can be called."""
        if self._run(snapshot).is_dir():
            return ()
        return tuple(
            digest
            for digest, length in snapshot.pieces().items()
            if not _has_size(self._pieces / digest, length)
        )

    def put(self, digest: str, data: bytes) -> None:
        """Keep a piece; raises RecordingError if it is not what its name says."""
        if xxh3_128_hexdigest(data) != digest:
            raise RecordingError(
                f"the piece {digest} was damaged on its way; check the network, and explore again"
            )
        number, name = tempfile.mkstemp(dir=self._scratch)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            Path(name).replace(self._pieces / digest)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def run(self, snapshot: Snapshot) -> Path | None:
        """Return the folder of the recording; None if pieces are lacking or were damaged here.

        Damaged ones are thrown away, so that `lacking` names them.
        """
        run = self._run(snapshot)
        if run.is_dir():
            return run
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as name:
            whole = [self._assemble(file, Path(name, "run")) for file in snapshot.files]
            if not all(whole):
                return None
            try:
                Path(name, "run").rename(run)
            except OSError:
                # Another process may have been quicker, with the same content.
                if not run.is_dir():
                    raise
        return run

    def _run(self, snapshot: Snapshot) -> Path:
        return self._runs / snapshot.digest

    def _assemble(self, file: SnapshotFile, folder: Path) -> bool:
        folder.mkdir(exist_ok=True)
        whole = True
        with (folder / file.name).open("wb", buffering=0) as target:
            target.truncate(file.size)
            for piece in file.pieces:
                path = self._pieces / piece.digest
                try:
                    data = path.read_bytes()
                except FileNotFoundError:
                    whole = False
                    continue
                if xxh3_128_hexdigest(data) != piece.digest:
                    path.unlink(missing_ok=True)
                    whole = False
                    continue
                _write_at(target.fileno(), data, piece.offset)
        return whole


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count

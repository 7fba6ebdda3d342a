"""An append-only byte stream that survives the death of its writer and costs no system call.

Appending copies into a small shared memory map of `PATH.tail`: its pages stay warm, and they are
the kernel's, so what is there outlives a kill -9. A thread empties full segments into PATH with
O_DIRECT, which is several times faster than growing a file through the page cache. The tail's
space is allocated before anything is accepted, so a full disk is an error here and never a
SIGBUS. The layout is specified in `nbdproxy.recording.format`.

Does not cover: the host losing power; nothing is synced.
"""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from nbdproxy.errors import RecordingFullError
from nbdproxy.recording.format import (
    CHECKSUM,
    NONE,
    TAIL_HEADER,
    TAIL_MAGIC,
    TAIL_PAGE,
    VERSION,
)


def tail_path(path: Path) -> Path:
    """Return where the newest part of the stream at `path` stands while it is written."""
    return path.with_name(path.name + ".tail")


class StreamWriter:
    """Appends to the new stream `path`; belongs to one thread.

    `segment` is in bytes and a multiple of 4096; `segments` of them are the tail. Appending blocks
    when all are full and none has reached the disk yet. Raises RecordingFullError when the disk
    is full, from then on always; what was appended before stays readable.
    """

    def __init__(self, path: Path, *, segment: int, segments: int) -> None:
        self._path = path
        self._segment = segment
        self._segments = segments
        self.position = 0
        """Bytes appended so far."""
        self._drained = 0
        self._error: OSError | None = None
        self._moved = threading.Condition()
        self._jobs: SimpleQueue[int | None] = SimpleQueue()
        self._fd = _create(path)
        self._map = self._make_tail()
        self._view = memoryview(self._map)
        self._thread = threading.Thread(target=self._drain, name=f"drain {path.name}", daemon=True)
        self._thread.start()

    def _make_tail(self) -> mmap.mmap:
        size = TAIL_PAGE + self._segment * self._segments
        fd = os.open(
            tail_path(self._path), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        try:
            os.posix_fallocate(fd, 0, size)
            tail = mmap.mmap(fd, size)
        except OSError as error:
            raise _full(self._path, error) from error
        finally:
            os.close(fd)
        TAIL_HEADER.pack_into(tail, 0, TAIL_MAGIC, VERSION, self._segments, self._segment)
        for index in range(self._segments):
            CHECKSUM.pack_into(tail, TAIL_HEADER.size + 8 * index, NONE)
        return tail

    def append(self, data: bytes | memoryview) -> int:
        """Append `data` and return where it begins."""
        begin = at = self.position
        end = begin + len(data)
        segment = self._segment
        if at % segment and at // segment == end // segment:
            where = TAIL_PAGE + at % (segment * self._segments)
            self._view[where : where + len(data)] = data
            self.position = end
            return begin
        source = memoryview(data)
        while at < end:
            if at % segment == 0:
                self._start_block(at // segment)
            count = min(end - at, segment - at % segment)
            where = TAIL_PAGE + at % (segment * self._segments)
            self._view[where : where + count] = source[at - begin : at - begin + count]
            at += count
            self.position = at
            if at % segment == 0:
                self._jobs.put(at // segment - 1)
        return begin

    def check(self) -> None:
        """Raise RecordingFullError if the disk below has refused what was appended earlier."""
        if self._error is not None:
            raise _full(self._path, self._error) from self._error

    def has_room(self, count: int) -> bool:
        """Tell whether `count` bytes can be appended without waiting for the disk."""
        free = self._segment * (self._segments - 1) - (self.position - self._drained)
        return count <= free

    def wait_for_room(self, count: int) -> None:
        """Block until `count` bytes have room, or all full segments are in the file."""
        with self._moved:
            while (
                self._error is None
                and not self.has_room(count)
                and self.position - self._drained >= self._segment
            ):
                self._moved.wait()

    def _start_block(self, block: int) -> None:
        """Take the segment of `block` into use, when what it held before is in the file."""
        with self._moved:
            while (
                self._error is None and self._drained < (block - self._segments + 1) * self._segment
            ):
                self._moved.wait()
        self.check()
        CHECKSUM.pack_into(self._map, TAIL_HEADER.size + 8 * (block % self._segments), block)

    def _drain(self) -> None:
        """Empty full segments into the file, oldest first; runs in its own thread."""
        while (block := self._jobs.get()) is not None:
            where = TAIL_PAGE + block % self._segments * self._segment
            try:
                _write_all(
                    self._fd, self._view[where : where + self._segment], block * self._segment
                )
            except OSError as error:
                with self._moved:
                    self._error = error
                    self._moved.notify_all()
                return
            with self._moved:
                self._drained = (block + 1) * self._segment
                self._moved.notify_all()

    def close(self) -> None:
        """Empty the tail into the file and remove it; closing twice is harmless.

        Raises RecordingFullError if the file cannot take it; the tail then stays, and is read.
        """
        if self._fd < 0:
            return
        self._jobs.put(None)
        self._thread.join()
        os.close(self._fd)
        self._fd = -1
        try:
            self.check()
            self._finish()
        finally:
            self._view.release()
            # The traceback of a failed write still refers to the map, which then goes with it.
            with suppress(BufferError):
                self._map.close()
        tail_path(self._path).unlink()

    def _finish(self) -> None:
        rest = self.position - self._drained
        where = TAIL_PAGE + self._drained % (self._segment * self._segments)
        try:
            with self._path.open("r+b", buffering=0) as file:
                _write_all(file.fileno(), self._view[where : where + rest], self._drained)
        except OSError as error:
            raise _full(self._path, error) from error

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _create(path: Path) -> int:
    """Create the stream's file, with O_DIRECT where the filesystem has it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        return os.open(path, (flags & ~os.O_EXCL) | os.O_TRUNC, 0o600)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _full(path: Path, error: OSError) -> RecordingFullError:
    return RecordingFullError(
        f"the recording {path} cannot grow: {error.strerror}; make room and record again"
    )


class StreamReader:
    """Reads a stream, whether its writer ended in order, was killed, or is still at work."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._blocks: dict[int, memoryview] = {}
        self._segment = 1
        self.size = os.fstat(self._fd).st_size
        """Bytes there are; behind the last one appended there may be garbage of a killed writer."""
        self._read_tail(tail_path(path))

    def _read_tail(self, path: Path) -> None:
        try:
            tail = path.read_bytes()
        except FileNotFoundError:
            return
        if len(tail) < TAIL_PAGE:
            return
        magic, version, segments, segment = TAIL_HEADER.unpack_from(tail)
        if magic != TAIL_MAGIC or version != VERSION:
            return
        if not segment or TAIL_HEADER.size + 8 * segments > TAIL_PAGE:
            return
        self._segment = segment
        # Blocks stand in turn, and none is begun before the one it replaces is in the file; a
        # number that cannot be is damage, and must not make a stream of any size.
        limit = self.size // segment + segments
        for index in range(segments):
            (block,) = CHECKSUM.unpack_from(tail, TAIL_HEADER.size + 8 * index)
            where = TAIL_PAGE + index * segment
            if block < limit and block % segments == index:
                self._blocks[block] = memoryview(tail)[where : where + segment]
                self.size = max(self.size, block * segment + len(self._blocks[block]))

    @property
    def has_tail(self) -> bool:
        """Whether the writer is still at work, or was killed."""
        return bool(self._blocks)

    def read_into(self, position: int, buffer: memoryview) -> int:
        """Fill `buffer` from `position`; return how many bytes there were."""
        if not self._blocks:
            return os.preadv(self._fd, [buffer], position) if buffer else 0
        done = 0
        while done < len(buffer):
            at = position + done
            count = min(len(buffer) - done, self._segment - at % self._segment)
            block = self._blocks.get(at // self._segment)
            if block is None:
                got = os.preadv(self._fd, [buffer[done : done + count]], at)
            else:
                part = block[at % self._segment :][:count]
                buffer[done : done + len(part)] = part
                got = len(part)
            if not got:
                break
            done += got
        return done

    def close(self) -> None:
        """Release the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

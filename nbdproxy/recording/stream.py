"""An append-only byte stream that survives the death of its writer and costs no system call.

Appending copies into the small file `PATH.tail`, by a shared map where that is safe (see `tail`):
its pages stay warm, and they are the kernel's, so what is there outlives a kill -9. A thread
empties full segments into PATH, where that is safe with O_DIRECT, which is several times faster
than growing a file through the page cache; else it waits for the disk, to be told its errors. The
tail's space is allocated before anything is accepted, and a full disk is an error here and never a
SIGBUS. The layout is specified in `nbdproxy.recording.format`.

Files are made new and only ever used by their descriptors: whatever comes to have their names
meanwhile is not written to. What was finished, or synced, survives the host losing power.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from nbdproxy.errors import RecordingError, RecordingFullError
from nbdproxy.private import NEW, open_plain
from nbdproxy.recording.format import (
    CHECKSUM,
    NONE,
    TAIL_HEADER,
    TAIL_MAGIC,
    TAIL_MAX,
    TAIL_PAGE,
    VERSION,
)
from nbdproxy.recording.tail import Tail


def tail_path(path: Path) -> Path:
    """Return where the newest part of the stream at `path` stands while it is written."""
    return path.with_name(path.name + ".tail")


class StreamWriter:
    """Appends to the new stream `path`; belongs to one thread, and `sync` to any.

    `folder` is the descriptor of the folder that `path` is in. `segment` is in bytes and a multiple
    of 4096; `segments` of them are the tail. With `durable`, what `sync` covered survives the host
    losing power. Appending blocks when all are full and none has reached the disk yet. Raises
    RecordingFullError when the disk is full, from then on always; what was appended before stays
    readable.
    """

    def __init__(
        self, path: Path, folder: int, *, segment: int, segments: int, durable: bool = False
    ) -> None:
        self._path = path
        self._folder = folder
        self._segment = segment
        self._segments = segments
        self._durable = durable
        self.position = 0
        """Bytes appended so far."""
        self._drained = 0
        self._error: OSError | None = None
        self._moved = threading.Condition()
        self._jobs: SimpleQueue[int | None] = SimpleQueue()
        self._fd = -1
        try:
            self._fd = os.open(path.name, os.O_WRONLY | NEW, 0o600, dir_fd=folder)
            self._tail = self._make_tail()
        except OSError as error:
            self._let_go()
            raise _full(path, error) from error
        self._view, self._is_mapped = self._tail.view, self._tail.is_mapped  # in the hot path
        if self._tail.is_direct:
            with suppress(OSError):  # a filesystem need not have it
                _set_direct(self._fd, wanted=True)
        self._thread = threading.Thread(target=self._drain, name=f"drain {path.name}", daemon=True)
        self._thread.start()

    def _make_tail(self) -> Tail:
        size = TAIL_PAGE + self._segment * self._segments
        name = tail_path(self._path).name
        tail = Tail(name, self._folder, size, durable=self._durable)
        head = TAIL_HEADER.pack(TAIL_MAGIC, VERSION, self._segments, self._segment)
        try:
            tail.put(0, head + CHECKSUM.pack(NONE) * self._segments)
        except OSError:
            tail.close()
            raise
        return tail

    def _put(self, where: int, data: bytes | memoryview) -> None:
        try:
            self._tail.put(where, data)
        except OSError as error:
            with self._moved:
                self._error = self._error or error
                self._moved.notify_all()
            raise _full(self._path, error) from error

    def append(self, data: bytes | memoryview) -> int:
        """Append `data` and return where it begins."""
        begin = at = self.position
        end = begin + len(data)
        segment = self._segment
        if at % segment and at // segment == end // segment:
            where = TAIL_PAGE + at % (segment * self._segments)
            if self._is_mapped:
                self._view[where : where + len(data)] = data
            else:
                self._put(where, data)
            self.position = end
            return begin
        source = memoryview(data)
        while at < end:
            if at % segment == 0:
                self._start_block(at // segment)
            count = min(end - at, segment - at % segment)
            where = TAIL_PAGE + at % (segment * self._segments)
            self._put(where, source[at - begin : at - begin + count])
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
        self._put(TAIL_HEADER.size + 8 * (block % self._segments), CHECKSUM.pack(block))

    def _drain(self) -> None:
        """Empty full segments into the file, oldest first; runs in its own thread."""
        while (block := self._jobs.get()) is not None:
            where = TAIL_PAGE + block % self._segments * self._segment
            try:
                _write_all(
                    self._fd, self._view[where : where + self._segment], block * self._segment
                )
                if self._durable:
                    self._free_durably(block)
                elif not self._tail.is_direct:
                    os.fdatasync(self._fd)
            except OSError as error:
                with self._moved:
                    self._error = error
                    self._moved.notify_all()
                return
            with self._moved:
                self._drained = (block + 1) * self._segment
                self._moved.notify_all()

    @property
    def status(self) -> os.stat_result:
        """What the filesystem says of the file."""
        return os.fstat(self._fd)

    def _free_durably(self, block: int) -> None:
        """Let a segment, which may have been synced, be used again when the file has its block.

        First its number goes: pages of the next block may come to the disk before theirs does.
        """
        os.fdatasync(self._fd)
        self._tail.put(TAIL_HEADER.size + 8 * (block % self._segments), CHECKSUM.pack(NONE))
        self._tail.sync()

    def sync(self) -> None:
        """Make durable what was appended before this call; may be called from another thread.

        Raises RecordingError if that fails.
        """
        assert self._durable
        try:
            self._tail.sync()  # full segments leave it only when they are durable
        except OSError as error:
            raise _not_durable(self._path, error) from error

    def finish(self) -> None:
        """Empty the tail into the file, and make that durable; doing so twice is harmless.

        Raises RecordingFullError if the file cannot take it; the tail then stays, and is read.
        """
        if self._fd < 0:
            return
        self._jobs.put(None)
        self._thread.join()
        try:
            self.check()
            self._finish()
        finally:
            self._let_go()
            self._tail.close()

    def _finish(self) -> None:
        rest = self.position - self._drained
        where = TAIL_PAGE + self._drained % (self._segment * self._segments)
        try:
            # The rest has any length.
            _set_direct(self._fd, wanted=False)
            _write_all(self._fd, self._view[where : where + rest], self._drained)
        except OSError as error:
            raise _full(self._path, error) from error
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _not_durable(self._path, error) from error

    def _let_go(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # what was written has been synced, or has failed before
                os.close(fd)

    def remove_tail(self) -> None:
        """Remove the tail of a finished stream, whose name is on the disk by now."""
        with suppress(FileNotFoundError):
            os.unlink(tail_path(self._path).name, dir_fd=self._folder)


def _set_direct(fd: int, *, wanted: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


_TODO = {
    errno.EEXIST: "record to a new folder",
    errno.ENOSPC: "make room and record again",
    errno.EDQUOT: "make room and record again",
    errno.EFBIG: "raise the limit (ulimit -f) and record again",
    errno.EMFILE: "raise the limit (ulimit -n) and record again",
}


def _full(path: Path, error: OSError) -> RecordingFullError:
    todo = _TODO.get(error.errno or 0, "see to the disk that it is on, and record again")
    return RecordingFullError(f"the recording {path} cannot grow: {error.strerror}; {todo}")


def _not_durable(path: Path, error: OSError) -> RecordingError:
    return RecordingError(
        f"the recording {path} cannot be made durable: {error.strerror}; see to the disk that it "
        "is on, and record again"
    )


def _read_tail(path: Path) -> bytes:
    try:
        with open(open_plain(path), "rb") as file:  # noqa: PTH123 - a descriptor
            return file.read(TAIL_MAX)
    except FileNotFoundError:
        return b""


class StreamReader:
    """Reads a stream, whether its writer ended in order, was killed, or is still at work."""

    def __init__(self, path: Path) -> None:
        self._fd = open_plain(path)
        self._blocks: dict[int, memoryview] = {}
        self._segment = 1
        self.size = 0
        """Bytes there are; behind the last one appended there may be garbage of a killed writer."""
        try:
            tail = _read_tail(tail_path(path))
            # Looked at second: what leaves the tail meanwhile is in the file.
            self.size = os.fstat(self._fd).st_size
            self._take(tail)
        except BaseException:
            self.close()
            raise

    def _take(self, tail: bytes) -> None:
        """Take the blocks of a tail that can be."""
        if len(tail) < TAIL_PAGE:
            return
        magic, version, segments, segment = TAIL_HEADER.unpack_from(tail)
        if magic != TAIL_MAGIC or version != VERSION:
            return
        if not segment or TAIL_HEADER.size + 8 * segments > TAIL_PAGE:
            return
        if TAIL_PAGE + segment * segments > TAIL_MAX:
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

    @property
    def status(self) -> os.stat_result:
        """What the filesystem says of the file."""
        return os.fstat(self._fd)

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

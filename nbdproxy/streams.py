"""Standard output and error, where a reader that is gone or slow raises nothing in between.

Standard error is for people to read beside the work: a line that cannot be written there is
counted, and said when one can be written again; nothing raises. Of standard output, a reader that
goes away (`| head`) has seen enough: the rest goes nowhere, and the exit code stays what it is. All
else that goes wrong there is an `OutputError`, because a result that is not whole is none.

Not covered: a file on a network filesystem that hangs, which no program can ask beforehand.
"""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from nbdproxy.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_OUT, _ERR = 1, 2
_WAIT_MS = 50
"""Milliseconds that a log which never waits is waited for, once, until it is written again."""


class _Stream(io.RawIOBase):
    """A descriptor that is written to, and stays open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Return True."""
        return True


class Results(_Stream):
    """Standard output; raises OutputError if it cannot be written, but for a reader that went."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.reader_gone = False

    def write(self, data: Buffer, /) -> int:
        """Write some of the data; return how many bytes."""
        if self.reader_gone:
            return memoryview(data).nbytes
        try:
            return os.write(self._fd, data)
        except BrokenPipeError:
            self.reader_gone = True
            return memoryview(data).nbytes
        except BlockingIOError:  # somebody made it non-blocking; it is still to be written
            select.select([], [self._fd], [])
            return 0
        except OSError as error:
            self.reader_gone = True  # what is left in buffers must not raise once more
            raise OutputError(
                f"the result cannot be written to standard output: {error.strerror}; make room "
                "there, or send it elsewhere"
            ) from None


class Notes(_Stream):
    """Standard error; nothing raises, and what is lost is counted in lines and said later.

    never_waits  a pipe or terminal that takes nothing loses lines, and holds up nobody
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._lost = 0
        self._reason = ""
        self._torn = False
        self.never_waits = False

    def write(self, data: Buffer, /) -> int:
        """Write some of the data, or forget all of it; return how many bytes."""
        whole = bytes(data)
        try:
            self._say_what_was_lost()
            return self._put(whole)
        except OSError as error:
            self._lost += whole.count(b"\n")
            self._reason = error.strerror or str(error)
            return len(whole)

    def finish(self) -> None:
        """Say what was lost, if that can be said by now."""
        with suppress(OSError):
            self._say_what_was_lost()

    def _say_what_was_lost(self) -> None:
        if not self._lost:
            return
        lines = "1 line was" if self._lost == 1 else f"{self._lost:,} lines were"
        text = f"nbdproxy: {lines} lost here, which could not be written: {self._reason}\n"
        self._put((b"\n" if self._torn else b"") + text.encode())
        self._lost = 0

    def _put(self, data: bytes) -> int:
        """Write some of the data. What is ready takes `PIPE_BUF` bytes without waiting."""
        wait_ms = None if not self.never_waits else 0 if self._lost else _WAIT_MS
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(wait_ms):
            raise BlockingIOError(0, "nobody reads them")
        count = os.write(self._fd, data[: select.PIPE_BUF] if self.never_waits else data)
        self._torn = data[count - 1 : count] != b"\n"
        return count


_results: Results | None = None
_notes: Notes | None = None


def guard() -> None:
    """Make this process's standard output and error such streams, once.

    A descriptor that is closed becomes /dev/null first: or the next file to be opened, the image,
    would get its number, and with it what is meant for people.
    """
    global _results, _notes
    for fd in (0, _OUT, _ERR):
        try:
            os.fstat(fd)
        except OSError:
            lowest = os.open(os.devnull, os.O_RDWR)  # the number that was free
            os.set_inheritable(lowest, True)
    if _results is None:
        _results, _notes = Results(_OUT), Notes(_ERR)
        sys.stdout = _text(_results, sys.stdout, "strict")
        sys.stderr = _text(_notes, sys.stderr, "backslashreplace")


def finish() -> None:
    """Write what is still in buffers; raises OutputError if results cannot be written."""
    try:
        sys.stdout.flush()
    finally:
        sys.stderr.flush()
        if _notes is not None:
            _notes.finish()


def reader_gone() -> bool:
    """Tell whether whoever read our results has gone: there is no need to go on with a list."""
    return _results is not None and _results.reader_gone


def give_up() -> None:
    """Write nothing more that would have to wait: the process was told to end."""
    if _results is not None:
        _results.reader_gone = True
    never_wait()


def never_wait() -> None:
    """From now on lose what standard error does not take at once: an event loop must go on."""
    if _notes is not None:
        _notes.never_waits = True


def _text(raw: Results | Notes, like: TextIO | None, errors: str) -> io.TextIOWrapper:
    """Return a text stream over `raw`, with the encoding of the one that it stands for."""
    if isinstance(like, io.TextIOWrapper):
        errors = like.errors or errors
    lines = raw.isatty() or isinstance(raw, Notes)
    encoding = getattr(like, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=lines)

"""One connection to a server as bytes: deadlines, a transcript, TLS; and what can go wrong on it.

Every wait ends: a server that says nothing within `Wire.patience_s`, or a check that used up its
time, is `SilentError`. What was sent and received is kept, shortened, as evidence for the report.
Nothing is imported from the product, so that both cannot share a mistake.

Not covered: what the bytes mean; see `haggle` for the handshake and `transmit` for the requests.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

SHOWN_BYTES = 40
"""As many bytes of a message as the transcript shows: a header and the begin of its payload."""


class ViolationError(AssertionError):
    """The server did what the specification forbids; the text says what."""


class ClosedError(ConnectionError):
    """The server closed the connection where an answer was due."""


class SilentError(TimeoutError):
    """The server neither answered nor closed in time."""


class AbsentError(Exception):
    """The server does not offer what a check is about; the text says how that was seen."""


class Clock:
    """A check's time and its transcript, shared by all its connections."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.transcript: deque[str] = deque(maxlen=60)
        self._muted = False

    def left(self) -> float:
        """Return the seconds that are left; raises SilentError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise SilentError("the check's time is over")
        return left

    def extend(self, seconds: float) -> None:
        """Give the check more time."""
        self._end += seconds

    def note(self, mark: str, data: bytes) -> None:
        """Add bytes to the transcript."""
        if not data:
            return
        shown = data[:SHOWN_BYTES].hex(" ", -4)
        more = f" … {len(data)} bytes" if len(data) > SHOWN_BYTES else ""
        self.say(f"{mark} {shown}{more}")

    def say(self, line: str) -> None:
        """Add a line to the transcript."""
        if not self._muted:
            self.transcript.append(line)

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Leave out of the transcript what only shows that the server still works."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before


class Wire:
    """A connection that reads exactly, never waits for ever and remembers what passed.

    patience_s: seconds of silence after which a wait ends in SilentError;
    secure: whether TLS runs;
    ragged: whether the server ended TLS without saying so.
    """

    def __init__(self, path: Path, clock: Clock, *, patience_s: float = 4.0) -> None:
        self.clock, self.patience_s = clock, patience_s
        self.secure, self.ragged = False, False
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._limit()
        try:
            self.sock.connect(str(path))
        except OSError as error:
            self.sock.close()
            raise ClosedError(f"no connection: {error}") from error

    def _limit(self, seconds: float | None = None) -> None:
        self.sock.settimeout(min(self.clock.left(), seconds or self.patience_s))

    def send(self, data: bytes, *, seconds: float | None = None) -> None:
        """Send all of it; raises ClosedError or SilentError."""
        self.clock.note("C", data)
        self._limit(seconds)
        try:
            self.sock.sendall(data)
        except TimeoutError as error:
            raise SilentError("the server stopped reading") from error
        except OSError as error:
            raise ClosedError(f"the server closed while it was sent to ({error})") from error

    def push(self, data: bytes, seconds: float) -> int:
        """Send as much as the server takes in that time; return the number of bytes."""
        self.clock.note("C", data)
        view, sent, end = memoryview(data), 0, time.monotonic() + seconds
        while sent < len(data) and (left := end - time.monotonic()) > 0:
            self._limit(left)
            try:
                sent += self.sock.send(view[sent : sent + (1 << 18)])
            except TimeoutError:
                break
            except OSError as error:
                raise ClosedError(f"the server closed after {sent} bytes ({error})") from error
        return sent

    def take(self, count: int) -> bytes:
        """Read exactly that many bytes; raises ClosedError or SilentError."""
        parts: list[bytes] = []
        missing = count
        while missing:
            part = self._receive(min(missing, 1 << 20))
            if not part:
                got = count - missing
                self.clock.note("S", b"".join(parts))
                raise ClosedError(f"the server closed after {got} of {count} bytes that were due")
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        self.clock.note("S", data)
        return data

    def _receive(self, most: int) -> bytes:
        self._limit()
        try:
            return self.sock.recv(most)
        except TimeoutError as error:
            raise SilentError(f"the server said nothing for {self.patience_s:g} s") from error
        except OSError as error:
            self.ragged = isinstance(error, ssl.SSLEOFError)
            self.clock.say(f"S ({error})")
            return b""

    def rest(self) -> bytes:
        """Wait until the server closes; return what it said before, at most 1 MiB."""
        parts: list[bytes] = []
        while part := self._receive(1 << 16):
            parts.append(part)
            if sum(map(len, parts)) > 1 << 20:
                raise ViolationError("the server sends on and on instead of closing")
        self.clock.note("S", b"".join(parts))
        self.clock.say("S (closed)")
        return b"".join(parts)

    def quiet(self, seconds: float = 0.15) -> bytes:
        """Return the bytes that nobody asked for, if some come within that time."""
        self._limit(seconds)
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return b""
        except OSError as error:
            raise ClosedError(f"the server closed ({error})") from error
        if not data:
            raise ClosedError("the server closed")
        self.clock.note("S", data)
        return data

    def shake_hands(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        """Become a TLS client; raises ssl.SSLError, ClosedError or SilentError."""
        self._limit()
        try:
            self.sock = context.wrap_socket(
                self.sock, server_hostname=name, suppress_ragged_eofs=False
            )
        except ssl.SSLError:
            raise
        except TimeoutError as error:
            raise SilentError("the server does not answer the TLS handshake") from error
        except OSError as error:
            raise ClosedError(f"the server closed in the TLS handshake ({error})") from error
        self.secure = True
        self.clock.say(f"- {self.sock.version()}")

    def half_close(self) -> None:
        """Tell the server that nothing more will come, and go on reading."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Drop the connection without a word."""
        self.sock.close()

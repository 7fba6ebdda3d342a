"""One server process on its own images: started, watched, measured and ended.

The image of every export begins with `DATA_BYTES` of a pattern that no check changes, behind it as
much hole, and from `SCRATCH` on it is the checks' to write to.

Not covered: what the server says on its socket.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import time
from functools import lru_cache
from pathlib import Path

from tests.blackbox.haggle import ABORT, GREETING, pack_option
from tests.blackbox.servers import MIB, Kind, Place, Setup

DATA_BYTES = MIB
SCRATCH = 4 * MIB
START_S = 15.0
"""Seconds that a server may take until it greets; an interpreter on a busy machine takes two."""


class StartError(RuntimeError):
    """The server did not start; the text is what it said."""


@lru_cache(maxsize=8)
def pattern(export: str) -> bytes:
    """Return what an export's image begins with."""
    return random.Random(export).randbytes(DATA_BYTES)


def make_images(folder: Path, setup: Setup) -> dict[str, Path]:
    """Make the image of each export; return their paths by the exports' names."""
    folder.mkdir()
    images = {}
    for name in setup.exports:
        images[name] = folder / (name or "unnamed")
        with images[name].open("wb") as file:
            file.write(pattern(name))
            file.truncate(setup.size)
    return images


class Running:
    """A server process; `started` waits until it greets. `end` or `kill` it.

    stopped: whether a check ended it on purpose, so that its end is no crash.
    """

    def __init__(self, kind: Kind, setup: Setup, folder: Path, certificates: Path) -> None:
        folder.mkdir()
        images = make_images(folder / "images", setup)
        self.kind, self.setup = kind, setup
        self.place = Place(folder, setup, images, certificates)
        self.stopped = False
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                kind.command(self.place),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # Writing a core takes so long that a crash would be laid to the next check.
        with contextlib.suppress(OSError):
            resource.prlimit(self._process.pid, resource.RLIMIT_CORE, (0, 0))

    @property
    def pid(self) -> int:
        """The number of the process that serves."""
        if self.kind.daemon:
            with contextlib.suppress(OSError, ValueError):
                return int(self.place.pid_file.read_text())
        return self._process.pid

    @property
    def socket(self) -> Path:
        """The path of its Unix socket."""
        return self.place.socket

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr, without the names of temporary folders."""
        text = self.log.read_text("utf-8", "backslashreplace")
        return text.replace(str(self.place.folder.parent), "...")

    @property
    def last_words(self) -> str:
        """The last lines of it, for a message."""
        return " / ".join(self.said.strip().splitlines()[-2:])[-300:]

    def started(self) -> None:
        """Wait until it greets a client; raises StartError."""
        end = time.monotonic() + START_S
        while not self._greets():
            if time.monotonic() > end or (
                not self.kind.daemon and self._process.poll() is not None
            ):
                self.kill()
                raise StartError(f"{self.kind.name} does not start: {self.last_words}")
            time.sleep(0.01)
        if self.kind.daemon:
            self._process.wait(START_S)

    def gave_up(self) -> bool:
        """Whether it ended instead of starting."""
        return not self.kind.daemon and self._process.poll() is not None

    def failed_in_order(self) -> bool:
        """Whether it ended with an exit code and without an exception of its interpreter."""
        ordered = self.ending().startswith("exit") and "Traceback" not in self.said
        self.stopped = self.stopped or ordered
        return ordered

    def _greets(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.settimeout(2)
            sock.connect(str(self.socket))
            greeting = b""
            while len(greeting) < 18 and (part := sock.recv(18 - len(greeting))):
                greeting += part
            if greeting[:16] == GREETING:
                # A server that resets now has greeted all the same.
                with contextlib.suppress(OSError):
                    sock.sendall(bytes([0, 0, 0, 3]) + pack_option(ABORT))
                    while sock.recv(1 << 12):
                        pass
                return True
        return False

    def alive(self) -> bool:
        """Whether the process still runs."""
        if not self.kind.daemon:
            return self._process.poll() is None
        with contextlib.suppress(OSError, IndexError):
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            return state not in {"Z", "X"}
        return False

    def ending(self) -> str:
        """How it ended: "exit 0", "signal SIGSEGV", or "ended" where that cannot be known."""
        code = None if self.kind.daemon else self._process.poll()
        if code is None:
            return "ended"
        return f"exit {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def signal(self, number: int) -> None:
        """Send it a signal; from then on its end is no crash."""
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait until it ended; return whether it did in time."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def kill(self) -> None:
        """End it and its children, however."""
        self.signal(signal.SIGTERM)
        if not self.wait(1.0):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait(5.0)

    def memory(self) -> int:
        """Return the bytes of memory that it and its children hold."""
        return sum(_resident(pid) for pid in _family(self.pid))


def _family(pid: int) -> list[int]:
    found, new = [pid], [pid]
    while new:
        parent = new.pop()
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                new += [int(word) for word in path.read_text().split()]
        found += [child for child in new if child not in found]
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0

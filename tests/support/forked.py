"""`nbdproxy serve` as a forked process: a server in milliseconds, for laws with many seeds."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

from tests.support.fork_server import shared
from tests.support.nbd_client import NbdClient
from tests.support.serving import DEADLINE_S, until


class ForkedServer:
    """`nbdproxy serve IMAGE OPTIONS...` on the Unix socket `socket`; a context manager.

    `command` is another one that serves on a socket.
    """

    def __init__(
        self, folder: Path, image: Path | str, *options: str | Path, command: str = "serve"
    ) -> None:
        self.socket = folder / "socket"
        self._log = folder / "log"
        argv = [command, str(image), "--socket", str(self.socket), *map(str, options)]
        self.pid = shared().start(argv, self._log, self._log)
        self._code: int | None = None
        # The URI is printed when clients are let in.
        until(lambda: "nbd+unix://" in self.log or self._ended(), "the server is ready")
        assert self._code is None, self.log

    @property
    def log(self) -> str:
        """All that it has said so far."""
        return self._log.read_text() if self._log.exists() else ""

    def client(self) -> NbdClient:
        """Open a connection."""
        return NbdClient.at(self.socket)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it ends; return its exit code, negative for a signal."""
        deadline = time.monotonic() + timeout_s
        while not self._ended():
            assert time.monotonic() < deadline, f"the server does not end: {self.log}"
            time.sleep(0.002)
        assert self._code is not None
        return self._code

    def _ended(self) -> bool:
        if self._code is None:
            self._code = shared().ended(self.pid)
        return self._code is not None

    def __enter__(self) -> ForkedServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            sys.stderr.write(f"nbdproxy said:\n{self.log}\n")
        if not self._ended():
            self.signal(signal.SIGKILL)
            self.wait()

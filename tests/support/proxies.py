"""`nbdproxy serve` in all its forms as forked processes: images, URIs, several exports, TCP, TLS.

`Proxy` is to `serve` what `ForkedServer` is to one image on a Unix socket. What the kernel knows
of the process (memory, descriptors) is told here, too.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.support.fork_server import shared
from tests.support.nbd_client import NbdClient
from tests.support.serving import DEADLINE_S, until

MIB = 1 << 20


class Proxy:
    """`nbdproxy serve WORDS...`; ready when the constructor returns. A context manager.

    It listens on the Unix socket `folder/socket` unless `listen` says where; `exports` is how many
    it has, and `uris` what they are called.
    """

    def __init__(
        self,
        folder: Path,
        *words: str | Path,
        exports: int = 1,
        listen: str | None = None,
        environment: Mapping[str, str] = {},
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.socket = folder / "socket"
        self._out, self._err = folder / "out", folder / "err"
        where = ("--socket", self.socket) if listen is None else ("--listen", listen)
        argv = ["serve", *map(str, words), *map(str, where)]
        self.pid = shared().start(argv, self._out, self._err, environment)
        self._code: int | None = None
        try:
            until(lambda: len(self._uris()) == exports or self.ended, "the server is ready")
            assert not self.ended, f"it ended with {self._code}: {self.stderr}"
        except BaseException:
            self.close()
            raise
        self.uris = self._uris()

    def _uris(self) -> list[str]:
        told = self._out.read_text() if self._out.exists() else ""
        return told.splitlines() if told.endswith("\n") else []

    @property
    def uri(self) -> str:
        """The first export's URI."""
        return self.uris[0]

    @property
    def stderr(self) -> str:
        """All that it has said so far."""
        return self._err.read_text() if self._err.exists() else ""

    @property
    def sentence(self) -> str:
        """The one sentence with which it ended; there must be no traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        said = [line for line in self.stderr.splitlines() if line.startswith("nbdproxy: ")]
        assert len(said) == 1, self.stderr
        return said[0].removeprefix("nbdproxy: ")

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        if self._code is None:
            self._code = shared().ended(self.pid)
        return self._code is not None

    @property
    def peak(self) -> int:
        """The most bytes of memory that it ever had resident (VmHWM)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    @property
    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def client(self, export: str | None = None) -> NbdClient:
        """Open a connection."""
        return NbdClient(self.uri, export=export)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it ends; return its exit code, negative for a signal."""
        deadline = time.monotonic() + timeout_s
        while not self.ended:
            assert time.monotonic() < deadline, f"the server does not end: {self.stderr}"
            time.sleep(0.002)
        assert self._code is not None
        return self._code

    def stop(self) -> int:
        """End it in order; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it as the kernel's out-of-memory killer would."""
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End it, however."""
        if not self.ended:
            self.kill()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            sys.stderr.write(f"nbdproxy said:\n{self.stderr}\n")
        self.close()

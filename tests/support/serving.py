"""`nbdproxy` as a process of its own: `serve` in the background, every other command to its end.

Nothing here knows the inside of the product. Every wait has a deadline; a server that is left over
at the end of a test is killed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.fork_server import shared
from tests.support.nbd_client import NbdClient

COMMAND = (sys.executable, "-m", "nbdproxy")
DEADLINE_S = 30.0


class Server:
    """A running `nbdproxy serve`; ready when the constructor returns. A context manager."""

    def __init__(
        self,
        image: Path,
        *options: str | Path,
        command: Sequence[str] = COMMAND,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        words = [*command, "serve", str(image), *map(str, options)]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.uri = self._first_line()
        except BaseException:
            self.close()
            raise

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        line = self.process.stdout.readline().decode().strip() if ready else ""
        assert line, f"no URI; stderr: {self.stderr}"
        return line

    @property
    def stderr(self) -> str:
        """All that it has said so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def client(self, export: str | None = None) -> NbdClient:
        """Open a connection."""
        return NbdClient(self.uri, export=export)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it ends; return its exit code."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """End it in order; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it as the kernel's out-of-memory killer would."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it, however."""
        if self.process.poll() is None:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Server:
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


def nbdproxy(
    *arguments: str | Path, code: int | None = 0, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; fails on another exit code than `code`, or on a traceback."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="nbdproxy-test-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        pid, ended = shared().start(words, out, err), None
        deadline = time.monotonic() + timeout_s
        while (ended := shared().ended(pid)) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"nbdproxy {' '.join(words)} does not end")
            time.sleep(0.002)
        texts = [p.read_text("utf-8", "surrogateescape") for p in (out, err)]
    done = subprocess.CompletedProcess(words, ended, *texts)
    assert "Traceback" not in done.stderr, done.stderr
    assert code is None or ended == code, (ended, done.stdout, done.stderr)
    return done


def tool(*words: str | Path, timeout_s: float = 60, code: int = 0) -> str:
    """Run somebody else's program to its end and return its stdout; a missing one is a failure."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"},
        check=False,
    )
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout


def until(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Poll until a condition holds; fails, saying what was waited for, at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain until {what}"
        time.sleep(0.005)

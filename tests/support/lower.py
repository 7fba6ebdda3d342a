"""Other people's NBD servers, as what nbdproxy stands above: nbdkit, qemu-nbd, QEMU's storage
daemon and nbd-server, each on a Unix socket of its own.

A server that is not installed, or does not start, is a failure that shows what it said.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from tests.support.serving import DEADLINE_S, until


class Lower:
    """A running server; ready when the constructor returns. A context manager.

    `pid_file` is set for one that goes to the background by itself.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        path: Path,
        *,
        export: str = "",
        pid_file: Path | None = None,
    ) -> None:
        self.socket, self._export, self._pid_file = path, export, pid_file
        self._log = path.with_suffix(".log")
        environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        try:
            until(lambda: self._listens() or self._gave_up(), f"{words[0]} listens")
            assert not self._gave_up(), f"{words[0]} did not start: {self.said}"
        except BaseException:
            self.close()
            raise

    def _listens(self) -> bool:
        if self._pid_file is not None and not self._pid_file.exists():
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def _gave_up(self) -> bool:
        return self.process.poll() not in ({None, 0} if self._pid_file else {None})

    @property
    def uri(self) -> str:
        """Its NBD URI."""
        return f"nbd+unix:///{quote(self._export)}?socket={quote(str(self.socket))}"

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._pid_file is not None and self._pid_file.exists():
            pid = int(self._pid_file.read_text())
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            until(lambda: not is_running(pid), "the daemon has ended")
        elif self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it, however."""
        self.kill()
        self.socket.unlink(missing_ok=True)

    def __enter__(self) -> Lower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_running(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def nbdkit(folder: Path, *words: str | Path) -> Lower:
    """Start nbdkit with these filters, this plugin and its parameters."""
    path = folder / "nbdkit.sock"
    return Lower(["nbdkit", "--foreground", "--exit-with-parent", "-U", path, *words], path)


def qemu_nbd(folder: Path, image: Path, *options: str | Path) -> Lower:
    """Start qemu-nbd on a raw image."""
    path = folder / "qemu-nbd.sock"
    common = ("--persistent", "--shared=0", f"--socket={path}", "--discard=unmap")
    formats = () if any("--format" in str(option) for option in options) else ("--format=raw",)
    return Lower(["qemu-nbd", *common, *formats, *options, image], path)


def storage_daemon(folder: Path, image: Path) -> Lower:
    """Start QEMU's storage daemon on a raw image."""
    path = folder / "daemon.sock"
    node = {"driver": "file", "node-name": "disk", "filename": str(image), "discard": "unmap"}
    address = {"addr": {"type": "unix", "path": str(path)}}
    export = {"type": "nbd", "id": "disk", "node-name": "disk", "name": "", "writable": True}
    words = ["qemu-storage-daemon", "--blockdev", json.dumps(node)]
    words += ["--nbd-server", json.dumps(address), "--export", json.dumps(export)]
    return Lower(words, path)


def nbd_server(folder: Path, image: Path) -> Lower:
    """Start nbd-server, whose export is called "disk"."""
    path, config = folder / "nbd-server.sock", folder / "nbd-server.conf"
    lines = ["[generic]", f"unixsock = {path}", "[disk]", f"exportname = {image}"]
    lines += ["flush = true", "fua = true", "trim = true"]
    config.write_text("\n".join(lines) + "\n")
    pid_file = folder / "nbd-server.pid"
    words = ("nbd-server", "-C", config, "-p", pid_file)
    return Lower(words, path, export="disk", pid_file=pid_file)


Start = Callable[[Path, Path], Lower]

KINDS: dict[str, Start] = {
    "nbdkit": lambda folder, image: nbdkit(folder, "file", image),
    "qemu-nbd": qemu_nbd,
    "storage-daemon": storage_daemon,
    "nbd-server": nbd_server,
}
"""How each kind of server is started in a folder on a raw image."""

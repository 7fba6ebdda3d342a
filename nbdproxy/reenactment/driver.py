"""QEMU's own driver of a format, in a qemu-storage-daemon between two ends that are both ours.

It reads and writes the files over sockets that it is given, so there is no name by which somebody
else could connect, and it ends with us.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.errors import ImageError
from nbdproxy.persistence.modes import THROUGH, CacheMode

_DAEMON = "qemu-storage-daemon"
_END_S = 10


class FormatDriver:
    """A running daemon.

    above   a connection to the guest's disk
    below   our end of the connection to each file, in the order of the nodes
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        said: IO[bytes],
        above: socket.socket,
        below: Sequence[socket.socket],
    ) -> None:
        self.above = above
        self.below = below
        self._process = process
        self._said = said

    def end(self) -> None:
        """Ask it to end in order: it writes its caches back, through the sockets."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Return its exit code, once it has ended; it is killed if it takes long."""
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    @property
    def last_words(self) -> str:
        """The last line that it wrote, without its own name; empty if it wrote nothing."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix(f"{_DAEMON}: ") if lines else ""


@contextmanager
def format_driver(
    mode: CacheMode, children: Sequence[str], options: dict[str, object]
) -> Iterator[FormatDriver]:
    """Have a daemon with a qcow2 node, for as long as the block runs.

    `children` are the names of the node's children that are read and written over sockets, and
    `options` what else the node is to have. Raises ImageError if there is no daemon here.
    """
    pairs = [socket.socketpair() for _ in children]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    above = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with tempfile.TemporaryFile() as said:
        process = None
        try:
            with tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder()) as folder:
                listener.bind(str(Path(folder, "socket")))
                listener.listen(1)
                above.connect(listener.getsockname())
            node = {**options, **_children(children, [theirs for _, theirs in pairs])}
            process = _start(mode, node, listener, [theirs for _, theirs in pairs], said)
            listener.close()
            for _, theirs in pairs:
                theirs.close()
            yield FormatDriver(process, said, above, [ours for ours, _ in pairs])
        finally:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
            for one in (listener, above, *(end for pair in pairs for end in pair)):
                one.close()


def qemu_version() -> str:
    """Return what the daemon says that it is; raises ImageError if there is none."""
    done = subprocess.run(
        [_program(), "--version"], capture_output=True, text=True, timeout=_END_S, check=False
    )
    return done.stdout.splitlines()[0] if done.stdout else _DAEMON


def _program() -> str:
    program = shutil.which(_DAEMON)
    if program is None:
        raise ImageError(
            f"{_DAEMON} is not installed, and playing a recording into qcow2 needs it: apt-get "
            "install qemu-system-common (or qemu-utils)"
        )
    return program


def _children(
    names: Sequence[str], sockets: Sequence[socket.socket]
) -> dict[str, dict[str, object]]:
    return {
        name: {
            "driver": "nbd",
            "server": {"type": "fd", "str": str(sock.fileno())},
            "discard": "unmap",
        }
        for name, sock in zip(names, sockets, strict=True)
    }


def _start(
    mode: CacheMode,
    options: dict[str, object],
    listener: socket.socket,
    files: Sequence[socket.socket],
    said: IO[bytes],
) -> subprocess.Popen[bytes]:
    no_flush = mode is CacheMode.UNSAFE
    node = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "cache": {"no-flush": no_flush},
        **options,
    }
    export = {"type": "nbd", "id": "disk", "node-name": "disk", "name": "", "writable": True}
    command = [
        *(_program(), "--blockdev", json.dumps(node)),
        *("--nbd-server", json.dumps({"addr": {"type": "fd", "str": str(listener.fileno())}})),
        *("--export", json.dumps({**export, "writethrough": mode in THROUGH})),
    ]
    # If we are killed, it must not stay; and Ctrl-C is for us, not for it.
    if guard := shutil.which("setpriv"):
        command = [guard, "--pdeathsig", "KILL", *command]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=said,
        start_new_session=True,
        pass_fds=[listener.fileno(), *(one.fileno() for one in files)],
    )

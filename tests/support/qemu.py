"""A real QEMU without a guest: its block layer, its NBD client and its monitor, in half a second.

Its exit is the real thing: the SHUTDOWN event, and then the flushes that QEMU sends on its way out.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType

from tests.support.serving import DEADLINE_S, until


class Qemu:
    """QEMU with one disk at an NBD Unix socket. `events` is a monitor for the server under test.

    `reconnect_s` is how long it waits for a server that went to come back.
    """

    def __init__(
        self, folder: Path, nbd: Path, *, image_format: str = "raw", reconnect_s: int = 0
    ) -> None:
        wire = f"driver=nbd,node-name=wire,server.type=unix,server.path={nbd}"
        self.events = folder / "qmp-events"
        hidden = folder / "qmp-hidden"
        own = folder / "qmp-own"
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-M", "none", "-S", "-nodefaults", "-display", "none"),
                *("-qmp", f"unix:{hidden},server=on,wait=off"),
                *("-qmp", f"unix:{own},server=on,wait=off"),
                *("-blockdev", f"{wire},reconnect-delay={reconnect_s}"),
                *("-blockdev", f"driver={image_format},node-name=disk,file=wire"),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._monitor.settimeout(DEADLINE_S)
        try:
            until(lambda: self._connects(own), "QEMU has its monitor")
            self._lines = self._monitor.makefile("r")
            self.execute("qmp_capabilities")
            # Only now: QEMU before 8.0 may miss commands of two monitors that come at once, and
            # answers neither before the next one (seen in 2 of 8,000 starts of QEMU 7.2).
            hidden.rename(self.events)
        except BaseException:
            self.close()
            raise

    def _connects(self, path: Path) -> bool:
        # The socket's file is there a moment before anybody listens.
        assert self.process.poll() is None, "QEMU did not start"
        return self._monitor.connect_ex(str(path)) == 0

    def execute(self, command: str, **arguments: str) -> object:
        """Run a monitor command and return what it returns."""
        message = {"execute": command, "arguments": arguments}
        self._monitor.sendall(json.dumps(message).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
        raise ConnectionError("QEMU closed its monitor")

    def io(self, command: str) -> str:
        """Run a qemu-io command on the disk; fails if it does."""
        told = self.execute(
            "human-monitor-command", **{"command-line": f'qemu-io disk "{command}"'}
        )
        assert isinstance(told, str)
        assert "failed" not in told.lower(), told
        assert "error" not in told.lower(), told
        return told

    def quit(self) -> int:
        """End QEMU as `quit` does, exit flushes and all; return its exit code."""
        self.execute("quit")
        return self.process.wait(DEADLINE_S)

    def terminate(self) -> int:
        """End QEMU with SIGTERM, which flushes as well; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End QEMU, however."""
        self._monitor.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""The checker guest: one boot, and then any number of disks of one size, one after the other.

What is behind its disk is exchanged between two mounts, which it cannot notice: the last unmount
of a disk drops all that Linux knows of it. `ask` hands a command to the guest's agent (`agent.js`).

Guarantees: no answer takes longer than its limit; a guest that does not answer, panics or ends is
gone afterwards, and `GuestError` says so. Plain blocking code.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.swap import SwapDisk
from nbdproxy.errors import LabError
from nbdproxy.extents import Extent
from nbdproxy.lab import accel, cpio, initramfs
from nbdproxy.lab.build import Lab
from nbdproxy.policy import loader
from nbdproxy.server.export import Export
from nbdproxy.server.shelf import FixedShelf
from nbdproxy.server.threaded import ThreadedServer

BOOT_LIMIT_S = 120.0
ANSWER_LIMIT_S = 120.0
MEMORY_MIB = 1024
_PORT = "checker"
_AGENT = Path(__file__).with_name("agent.js")
_RETRY_S = 0.05

_RUN = """n=0; until [ -b /dev/vda ] && [ -b /dev/vdb ]; do
  n=$((n+1)); [ $n -gt 200 ] && exit; sleep 0.05
done
mount -t ext4 -o ro /dev/vda /tools
load console
/tools/bin/node /agent.js
"""


class GuestError(LabError):
    """The checker guest did not start, did not answer, or ended."""


class CheckerGuest:
    """A running guest with a disk of `size` bytes; ends with `close`."""

    def __init__(self, lab: Lab, size: int) -> None:
        self.size = size
        self._disk = SwapDisk(size)
        self._pending = b""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdproxy-")))
            export = Export("state", self._disk, loader.load("passthrough").policy)
            stack.callback(export.close)
            server = stack.enter_context(ThreadedServer(FixedShelf([export])))
            command = _command(lab, server.uri("state"), folder / "port")
            entries = [
                cpio.regular("run.sh", _RUN.encode()),
                cpio.regular("agent.js", _AGENT.read_bytes()),
            ]
            initrd = stack.enter_context(initramfs.extended(lab.kit.initrd, entries))
            accelerator = accel.probe(lab.cache, lab.kit)
            base = accel.base_command(lab.kit.kernel, initrd, accelerator, memory_mib=MEMORY_MIB)
            self._qemu = stack.enter_context(accel.running([*base, *command]))
            self._socket = stack.enter_context(self._connect(folder / "port"))
            self.ask("hello", limit_s=BOOT_LIMIT_S)
            self._stack = stack.pop_all()

    def show(self, device: ReadableDevice) -> None:
        """Put a disk of the same size behind the guest's; nothing may be mounted."""
        self._disk.put(device)

    def changed(self) -> list[Extent]:
        """Return what the guest has changed on the disk since it was shown."""
        return self._disk.changed()

    def ask(self, command: str, *, limit_s: float = ANSWER_LIMIT_S, **what: Any) -> dict[str, Any]:
        """Return the agent's answer to a command; raises GuestError if there is none."""
        deadline = time.monotonic() + limit_s
        try:
            self._socket.settimeout(limit_s)
            self._socket.sendall(json.dumps({"do": command, **what}).encode() + b"\n")
            found: dict[str, Any] = json.loads(self._line(deadline))
        except TimeoutError:
            raise GuestError(f"the checker guest did not answer within {limit_s:g} s") from None
        except OSError as error:
            raise self._gone(str(error)) from None
        if "failed" in found:
            raise GuestError(f"the checker guest could not {command}: {found['failed']}")
        return found

    def kill(self) -> None:
        """End QEMU at once, as a crash of it would; what is asked next fails."""
        accel.kill(self._qemu)

    def close(self) -> None:
        """End the guest."""
        self._stack.close()

    def _line(self, deadline: float) -> bytes:
        parts = [self._pending]
        while b"\n" not in parts[-1]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(1 << 20)
            if not data:
                raise self._gone("it ended")
            parts.append(data)
        line, _, self._pending = b"".join(parts).partition(b"\n")
        return line

    def _connect(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + BOOT_LIMIT_S
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while time.monotonic() < deadline and self._qemu.poll() is None:
            if path.exists() and not made.connect_ex(str(path)):
                return made
            time.sleep(_RETRY_S)
        made.close()
        raise self._gone("QEMU did not start")

    def _gone(self, why: str) -> GuestError:
        """Say how it ended, with the last words of its console."""
        accel.kill(self._qemu)
        said = _console(self._qemu)
        return GuestError(f"the checker guest is gone ({why})" + (f": {said}" if said else ""))


def _console(qemu: subprocess.Popen[bytes]) -> str:
    assert qemu.stdout is not None
    lines = qemu.stdout.read().decode(errors="replace").split("\n")
    return " / ".join([line.strip() for line in lines if line.strip()][-3:])


def _command(lab: Lab, uri: str, port: Path) -> list[str]:
    tools = f"file.driver=file,file.filename={str(lab.tools_disk).replace(',', ',,')}"
    return [
        "-drive", f"if=none,id=tools,format=raw,readonly=on,file.locking=off,{tools}",
        "-device", "virtio-blk-pci,drive=tools,addr=4",
        "-drive", f"if=none,id=state,format=raw,cache=writeback,file={uri.replace(',', ',,')}",
        "-device", "virtio-blk-pci,drive=state,addr=5",
        "-device", "virtio-serial-pci,addr=6",
        "-chardev", f"socket,id=port,path={port},server=on,wait=off",
        "-device", f"virtserialport,chardev=port,name={_PORT}",
    ]  # fmt: skip

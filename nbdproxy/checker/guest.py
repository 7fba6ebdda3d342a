"""The checker guest: one boot, and then any number of disks of any size, one after the other.

The data behind its disk is exchanged between two mounts, and a new partition of the new length is
made on it, of which Linux has nothing cached. `ask` sends a command to the guest's agent
(`agent.js`).

Guarantees: commands and answers are numbered. An answer that is late, out of order or invalid, a
disk that could not be read here, and a kernel that reported a fault of its own raise `GuestError`;
the guest is ended then, and no answer of it is used. Plain blocking code.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.disks.swap import SwapDisk
from nbdproxy.errors import LabError
from nbdproxy.extents import Extent
from nbdproxy.lab.guest import accel, cpio, initramfs
from nbdproxy.lab.guest.build import Lab
from nbdproxy.policy import loader
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.export_provider import FixedExports
from nbdproxy.state_server.background import ThreadedServer

BOOT_LIMIT_S = 120.0
ANSWER_LIMIT_S = 120.0
MEMORY_MIB = 1024
DISK_SIZE = 1 << 60
"""Bytes of the guest's disk, which begins with the state."""
_PORT = "checker"
_PROGRAMS = [Path(__file__).with_name(name) for name in ("agent.js", "attach.pl")]
_RETRY_S = 0.05
_GLANCE_S = 1.0
_ANSWER_MAX = MEMORY_MIB << 20
"""Bytes of an answer at most: the guest has it in its memory."""

_RUN = """n=0; until [ -b /dev/vda ] && [ -b /dev/vdb ]; do
  n=$((n+1)); [ $n -gt 200 ] && exit; sleep 0.05
done
mount -t ext4 -o ro /dev/vda /tools
load console
echo 1 > /proc/sys/kernel/panic_on_oops
mkfifo /attach.in /attach.out
/tools/bin/perl /attach.pl < /attach.in > /attach.out &
/tools/bin/node /agent.js
"""

_STUMBLED = re.compile(
    r"\bBUG: |kernel BUG at|\bOops\b|general protection fault|blocked for more than \d+ seconds"
    r"|page allocation failure"
    r"| error, dev vd[a-z]+, sector"  # the disk answered that: it is not what a filesystem found
)
"""Messages of a kernel whose later answers need not depend on the disk alone."""


class GuestError(LabError):
    """The checker guest did not start, gave no valid answer, or ended; no verdict follows."""


class AgentPort:
    """The connection to the guest's agent: numbered commands, and an answer to each.

    `starved` returns for how many seconds so far the guest waited for a processor.

    said  the guest's kernel messages during the last command, line by line
    """

    def __init__(self, connected: socket.socket, starved: Callable[[], float]) -> None:
        self.said: list[str] = []
        self._socket = connected
        self._starved = starved
        self._pending = b""
        self._number = 0

    def ask(self, command: str, limit_s: float, **what: Any) -> dict[str, Any]:
        """Return what the agent found.

        Raises GuestError if it did not find anything, TimeoutError if it took more than `limit_s`
        seconds, those not counted in which it was starved, and OSError if it is gone. After any of
        these it is not to be asked again.
        """
        self._number += 1
        self._socket.settimeout(limit_s)
        request = {"number": self._number, "do": command, **what}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._line(limit_s)
        try:
            answer = json.loads(line)
            number, self.said = answer["number"], answer["log"]
            found: dict[str, Any] | None = answer.get("found")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise GuestError(f"the checker guest's answer is none: {line[:60]!r}") from None
        if number != self._number:
            raise GuestError(
                f"the checker guest is out of step: answer {number} to command {self._number}"
            )
        if found is None:
            raise GuestError(f"the checker guest could not {command}: {answer.get('failed')}")
        if words := next(filter(_STUMBLED.search, self.said), None):
            raise GuestError(f"the checker guest's kernel stumbled: {words}")
        return found

    def _line(self, limit_s: float) -> bytes:
        parts, size = [self._pending], len(self._pending)
        while b"\n" not in parts[-1]:
            if size > _ANSWER_MAX:
                raise GuestError("the checker guest's answer has no end")
            if limit_s <= 0:
                raise TimeoutError
            began, starved = time.monotonic(), self._starved()
            self._socket.settimeout(min(limit_s, _GLANCE_S))
            try:
                data = self._socket.recv(1 << 20)
            except TimeoutError:
                data = None
            lost = max(0.0, self._starved() - starved)  # less, if a thread has ended
            limit_s -= max(0.0, time.monotonic() - began - lost)
            if data is None:
                continue
            if not data:
                raise ConnectionError("it ended")
            parts.append(data)
            size += len(data)
        line, _, self._pending = b"".join(parts).partition(b"\n")
        return line


class CheckerGuest:
    """A running guest; ends with `close`.

    process  what runs QEMU, in a process group of its own
    """

    def __init__(self, lab: Lab) -> None:
        self._disk = SwapDisk(DISK_SIZE)
        with ExitStack() as stack:
            folder = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
                )
            )
            export = Export("state", ImageStore(self._disk), loader.load("passthrough").policy)
            stack.callback(export.close)
            server = stack.enter_context(ThreadedServer(FixedExports([export])))
            command = _command(lab, server.uri("state"), folder / "port")
            entries = [cpio.regular(path.name, path.read_bytes()) for path in _PROGRAMS]
            entries.append(cpio.regular("run.sh", _RUN.encode()))
            initrd = stack.enter_context(initramfs.extended(lab.kit.initrd, entries))
            accelerator = accel.probe(lab.cache, lab.kit)
            base = accel.base_command(lab.kit.kernel, initrd, accelerator, memory_mib=MEMORY_MIB)
            self.process = stack.enter_context(accel.running([*base, *command]))
            connected = stack.enter_context(self._connect(folder / "port"))
            self._port = AgentPort(connected, lambda: accel.starved_s(self.process))
            self.ask("hello", limit_s=BOOT_LIMIT_S)
            self._stack = stack.pop_all()

    def show(self, device: ReadableDevice) -> None:
        """Put a disk behind the guest's; nothing may be mounted."""
        self._disk.put(device)

    def changed(self) -> list[Extent]:
        """Return what the guest has changed on the disk since it was shown."""
        return self._disk.changed()

    def pread(self, offset: int, length: int) -> bytes:
        """Return what the disk holds now, with what the guest has changed."""
        return self._disk.pread(offset, length)

    @property
    def said(self) -> list[str]:
        """What its kernel said while it did the last command, line by line."""
        return self._port.said

    def ask(self, command: str, *, limit_s: float = ANSWER_LIMIT_S, **what: Any) -> dict[str, Any]:
        """Return what the agent found; raises GuestError, with the guest gone, if it found nothing.

        `limit_s` are seconds in which QEMU ran, or had no need to: not those in which it wanted a
        processor and had none.
        """
        try:
            found = self._port.ask(command, limit_s, **what)
            self._must_have_read()
        except TimeoutError:
            self.kill()
            raise GuestError(f"the checker guest did not answer within {limit_s:g} s") from None
        except OSError as error:
            raise self._gone(str(error)) from None
        except BaseException:
            self.kill()
            self._must_have_read()
            raise
        return found

    def kill(self) -> None:
        """End QEMU at once, as a crash of it would; what is asked next fails."""
        accel.kill(self.process)

    def close(self) -> None:
        """End the guest."""
        self._stack.close()

    def _must_have_read(self) -> None:
        """Raise GuestError if the disk that is shown could not be read on this side."""
        if self._disk.failure is not None:
            raise GuestError(f"the state could not be read here: {self._disk.failure}")

    def _connect(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + BOOT_LIMIT_S
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while time.monotonic() < deadline and self.process.poll() is None:
            if path.exists() and not made.connect_ex(str(path)):
                return made
            time.sleep(_RETRY_S)
        made.close()
        raise self._gone("QEMU did not start")

    def _gone(self, why: str) -> GuestError:
        """Say how it ended, with the last words of its console."""
        accel.kill(self.process)
        said = _console(self.process)
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

"""Starting, watching and ending QEMU, and whether its guests can use KVM on this host.

A guest is given up when it hangs, not when it is slow: `Pulse` tells the one from the other by what
it prints and by the processor's time that QEMU uses, which a busy host only stretches.

`/dev/kvm` opening says little: in some nested hosts a guest then hangs. So the probe boots the
lab's own kernel under KVM, with a limit, and keeps the answer in the lab's cache until the
host is booted again or QEMU changes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nbdproxy.lab.guest import tools
from nbdproxy.lab.guest.build import Kit
from nbdproxy.lab.guest.cache import identity_of, key_of
from nbdproxy.lab.guest.initramfs import MARK

KVM = "kvm"
TCG = "tcg"

PROBE_LIMIT_S = 8.0
"""Processor time for a guest under KVM to boot; it takes about one second."""
_WAIT_FACTOR = 4
"""How many times as long, by the clock, that may take."""

QUIET_S = 300.0
"""A guest that prints nothing for so long, and hardly uses the processor, hangs."""
SILENT_CPU_S = 1800.0
"""A guest that prints nothing while QEMU uses so much processor time hangs, too."""
_BUSY = 1 / 60
"""The share of one processor below which a guest does nothing; under TCG an idle one has 0.4 %."""
TICK_S = 1.0
"""How often one looks."""

# Without no_timer_check a kernel that is emulated on a busy host may panic in its first second:
# it waits for a timer's interrupt by counting, and gives up.
_KERNEL_LINE = (
    "console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check random.trust_cpu=on "
    "cryptomgr.notests"
)
# Under KVM, QEMU 7.2 aborts on some nested hosts when it passes all of the host's features on.
_CPU = {TCG: "max,la57=off", KVM: "qemu64"}
_MEMORY_PROBE_MIB = 256
_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def base_command(
    kernel: Path, initrd: Path, accelerator: str, *, memory_mib: int, cpus: int = 1
) -> list[str]:
    """Return the QEMU command of a guest without disks, its serial port on stdio."""
    qemu = tools.require(["qemu-system-x86_64"])["qemu-system-x86_64"]
    return [
        str(qemu), "-M", "pc", "-accel", accelerator, "-cpu", _CPU[accelerator],
        "-m", str(memory_mib), "-smp", str(cpus),
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", _KERNEL_LINE,
    ]  # fmt: skip


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run QEMU, its output on a pipe; it is gone when the block is left, however it is left.

    With the thread that started it, however that ends, QEMU is killed.
    """
    bound = [str(tools.require(["setpriv"])["setpriv"]), "--pdeathsig", "KILL"]
    process = subprocess.Popen(
        [*bound, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)
        assert process.stdout is not None
        process.stdout.close()


@dataclass(slots=True)
class Pulse:
    """Tells whether a guest that prints nothing still works; all times in seconds.

    `idle_s` is for how long it may rightly do nothing, beyond `QUIET_S`.
    """

    pid: int
    idle_s: float = 0
    _silent_from: float = 0
    _quiet_at: float = field(default_factory=time.monotonic)
    _quiet_from: float = 0
    _looked_at: float = 0

    def beat(self) -> None:
        """Take note that the guest has printed something."""
        self._silent_from = self._quiet_from = cpu_s(self.pid)
        self._quiet_at = time.monotonic()

    def trouble(self) -> str | None:
        """Say what shows that it hangs, if it does; looks once in `TICK_S`."""
        now = time.monotonic()
        if now - self._looked_at < TICK_S:
            return None
        self._looked_at = now
        used, quiet = cpu_s(self.pid), now - self._quiet_at
        if used - self._silent_from > SILENT_CPU_S:
            return f"it printed nothing in {SILENT_CPU_S:,.0f} s of processor time"
        if quiet > QUIET_S + self.idle_s:
            if used - self._quiet_from < _BUSY * quiet:
                return f"it has printed nothing and done nothing for {quiet:,.0f} s"
            self._quiet_at, self._quiet_from = now, used
        return None


def cpu_s(pid: int) -> float:
    """Return how many seconds of processor time a process has used, in all its threads.

    It is 0 for a process that is gone.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL QEMU; harmless if it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def starved_s(process: subprocess.Popen[bytes]) -> float:
    """Return for how many seconds so far a process wanted a processor and had none.

    Of its threads, and those of its children, it is the one that waited most, by
    `/proc/PID/schedstat`; 0 if that is not told.
    """
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        waits = [
            int((task / "schedstat").read_text().split()[1])
            for pid in (process.pid, *children)
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(waits, default=0) / 1e9


def probe(cache: Path, kit: Kit) -> str:
    """Return `kvm` if a guest really runs under it here, else `tcg`; tried once per boot."""
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return TCG
    qemu = tools.require(["qemu-system-x86_64"])["qemu-system-x86_64"]
    key = key_of(_BOOT_ID.read_text(), identity_of(qemu), kit.kernel.parent.name)
    answer = cache / f"accel-{key}"
    with contextlib.suppress(FileNotFoundError):
        return answer.read_text().strip()
    found = KVM if boots(kit, KVM, PROBE_LIMIT_S) else TCG
    fresh = answer.with_suffix(f".{os.getpid()}")
    fresh.write_text(f"{found}\n")
    fresh.rename(answer)
    return found


def boots(kit: Kit, accelerator: str, limit_s: float) -> bool:
    """Tell whether the lab's kernel gets to its init and powers off.

    QEMU may use `limit_s` seconds of processor time, and four times as long by the clock.
    """
    command = base_command(kit.kernel, kit.initrd, accelerator, memory_mib=_MEMORY_PROBE_MIB)
    deadline = time.monotonic() + _WAIT_FACTOR * limit_s
    with running(command) as process:
        while time.monotonic() < deadline and cpu_s(process.pid) < limit_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=min(limit_s, TICK_S))
                return f"{MARK} booted".encode() in said and process.returncode == 0
    return False

"""Starting and ending QEMU, and whether its guests can use KVM on this host.

`/dev/kvm` opening says little: in some nested hosts a guest then hangs. So the probe boots the
lab's own kernel under KVM, with a time limit, and keeps the answer in the lab's cache until the
host is booted again or QEMU changes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nbdproxy.lab import tools
from nbdproxy.lab.build import Kit
from nbdproxy.lab.cache import identity_of, key_of
from nbdproxy.lab.initramfs import MARK

KVM = "kvm"
TCG = "tcg"

PROBE_LIMIT_S = 8.0  # a guest under KVM is through in about one second

_KERNEL_LINE = (
    "console=ttyS0 panic=-1 quiet mitigations=off nokaslr random.trust_cpu=on cryptomgr.notests"
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
def running(command: Sequence[str], time_limit_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """Run QEMU, its output on a pipe; it is gone when the block is left, however it is left."""
    # With the thread that started it, however that ends, `timeout` is killed, and QEMU with it; the
    # spare second leaves us to be first.
    bound = [str(tools.require(["setpriv"])["setpriv"]), "--pdeathsig", "KILL"]
    limit = ["timeout", "--foreground", "--signal=KILL", f"{time_limit_s + 1:.0f}"]
    process = subprocess.Popen(
        [*bound, *limit, *bound, *command],
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


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL QEMU, and `timeout` with it; harmless if it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def starved_s(process: subprocess.Popen[bytes]) -> float:
    """Return for how many seconds so far QEMU wanted a processor and had none.

    Of its threads it is the one that waited most, by `/proc/PID/schedstat`; 0 if that is not told.
    """
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")  # `timeout` has one: QEMU
    try:
        tasks = Path(f"/proc/{int(children.read_text())}/task").iterdir()
        waits = [int((task / "schedstat").read_text().split()[1]) for task in tasks]
    except (OSError, ValueError):
        return 0.0
    return max(waits) / 1e9


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


def boots(kit: Kit, accelerator: str, time_limit_s: float) -> bool:
    """Tell whether the lab's kernel gets to its init and powers off within the limit."""
    command = base_command(kit.kernel, kit.initrd, accelerator, memory_mib=_MEMORY_PROBE_MIB)
    with running(command, time_limit_s) as process:
        try:
            said, _ = process.communicate(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            return False
    return f"{MARK} booted".encode() in said and process.returncode == 0

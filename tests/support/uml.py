"""User Mode Linux: a guest that is an ordinary process, with this host's own files.

    run(tmp_path, [sys.executable, "-m", "some.module"], disks=[image])

The kernel is that of Debian's package `user-mode-linux`, fetched and unpacked once into the lab's
cache (see `lab/guest/build.py`); it needs no root and no network after that. A command runs in it
as root with the host's own file system to read. What it may write is: `folder`, at the same path
as here; an empty tmpfs at `ROOM`; and the disks, which are /dev/ubda, /dev/ubdb and so on. It has
one processor, and no network.

Guarantees: a guest that cannot boot, does not reach the command's end or takes too long is an
error that says what it printed; no process of it is left.

Where the processor has AMX, this kernel has no room for all registers of a process; there
`uml_registers.c` is compiled and loaded into it.

Does not cover hosts where ptrace(2) is forbidden: that is such an error.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nbdproxy.lab.guest import kernel
from nbdproxy.lab.guest.cache import LabCache, default_cache, key_of

ROOM = Path("/media")
"""Where the guest has an empty tmpfs to write to; nothing of the host's is needed there."""
PACKAGE = "user-mode-linux"
_LIMIT_S = 480.0

_REGISTERS = Path(__file__).with_name("uml_registers.c")
_COMPILE = ["cc", "-shared", "-fPIC", "-O1", "-nostdlib", "-fno-stack-protector"]

_SAID = "console"
_STATUS = "status"
_INIT = """
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none {room}
mkdir -p {folder}
# Linux 6.1 has no name for what 6.12 wants named.
mount -t hostfs none {folder} -o {folder} || mount -t hostfs none {folder} -o hostfs={folder}
cd {here}
export HOME={room} TMPDIR={room}
# Here a page fault is dear: what was allocated once is kept.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
{command} > {folder}/said 2>&1
echo $? > {folder}/{status}
echo o > /proc/sysrq-trigger
sleep 60
"""


class UmlError(Exception):
    """The guest did not do what it was to do; says what it printed."""


def linux() -> Path:
    """Return the program that is the kernel, fetching it if the cache has none for this Debian."""

    def fetch(into: Path) -> None:
        (into / "package").write_text(kernel.unpack(PACKAGE, into / "root"))

    parts = LabCache(default_cache().resolve())
    release = platform.freedesktop_os_release().get("VERSION_ID", "")
    with parts.locked():
        found = parts.part("uml", key_of(PACKAGE, release), fetch, f"lab: fetching {PACKAGE}")
    return found / "root" / "usr" / "bin" / "linux.uml"


def _preloaded() -> dict[str, str]:
    """Return what has to be in the kernel's environment on this processor, built if need be."""
    if " amx_tile " not in Path("/proc/cpuinfo").read_text():
        return {}

    def compile_it(into: Path) -> None:
        subprocess.run([*_COMPILE, "-o", into / "registers.so", _REGISTERS], check=True)

    parts = LabCache(default_cache().resolve())
    with parts.locked():
        key = key_of(_REGISTERS.read_text(), *_COMPILE)
        found = parts.part("uml-registers", key, compile_it, "lab: compiling uml_registers.c")
    return {"LD_PRELOAD": str(found / "registers.so")}


def run(
    folder: Path,
    command: Sequence[str | Path],
    *,
    disks: Sequence[Path] = (),
    memory_mib: int = 384,
    under: Sequence[str] = (),
) -> str:
    """Run a command in a guest, and return all that it printed; raises UmlError.

    That the command fails is an error, too. `under` is what starts the kernel, as strace(1).
    """
    folder = folder.resolve()
    init = _INIT.format(
        room=ROOM,
        folder=shlex.quote(str(folder)),
        here=shlex.quote(os.getcwd()),  # noqa: PTH109 - text
        command=shlex.join(map(str, command)),
        status=_STATUS,
    )
    (folder / "init").write_text(init)
    words = [*under, str(linux()), f"mem={memory_mib}M", f"uml_dir={folder}"]
    words += ["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet"]
    words += ["con=null", "con0=null,fd:1"]
    words += [f"ubd{number}={disk}" for number, disk in enumerate(disks)]
    words += ["init=/bin/sh", "--", str(folder / "init")]
    ended = _run(words, folder / _SAID)
    status = folder / _STATUS
    if not status.exists():
        said = (folder / _SAID).read_text(errors="replace")
        raise UmlError(
            f"User Mode Linux {ended} before its command did; it needs ptrace(2), which containers "
            "may forbid (docker run --cap-add SYS_PTRACE), and a TMPDIR whose files may be "
            f"executed. It said:\n{said}"
        )
    printed = (folder / "said").read_text(errors="replace")
    if (code := status.read_text().strip()) != "0":
        raise UmlError(f"the guest's command ended with {code}; it said:\n{printed}")
    return printed


def _run(words: Sequence[str], said: Path) -> str:
    """Run the kernel to its end; tell what that was."""
    with said.open("wb") as output:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # its processes form a group that can be ended
            # Its memory is in TMPDIR: /dev/shm may be small.
            env={**os.environ, "TMPDIR": str(said.parent), **_preloaded()},
        )
    try:
        return f"ended with status {process.wait(_LIMIT_S)}"
    except subprocess.TimeoutExpired:
        return f"was ended after {_LIMIT_S:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

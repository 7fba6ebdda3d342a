"""The guest's initramfs: static busybox, the modules, and an init of a few lines.

Guarantees: made without root, the same ingredients give the same bytes. The init loads the
modules, mounts the tools disk if there is one, and runs `/run.sh` if an archive appended to this
one brings it; otherwise it powers off at once, which is what the probe of `accel` wants. Every
`@lab` line on the serial port is for `guest` to read.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.errors import LabError
from nbdproxy.lab.guest import cpio, tools

MARK = "@lab"
"""What begins a line of the guest that is meant for the host."""

INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
exec < /dev/console > /dev/console 2>&1
load() {{ for name in $(cat /modules/$1.order); do insmod /modules/$name.ko; done; }}
load boot
echo "{MARK} booted"
if [ -e /run.sh ]; then . /run.sh; fi
echo o > /proc/sysrq-trigger
while :; do sleep 60; done
"""

_FOLDERS = ("bin", "dev", "proc", "sys", "tmp", "root", "modules", "tools", "mnt")
_LOADER_FOLDERS = ("lib", "lib64", "usr")  # the tools disk's programs find their libraries here

_ELF_HEADER = struct.Struct("<4s28xQ14xHH")  # magic, e_phoff, e_phentsize, e_phnum (64 bit)
_PT_INTERP = 3


def build(kernel_part: Path, busybox: Path) -> bytes:
    """Return the archive."""
    program = busybox.read_bytes()
    if _is_dynamic(program):
        raise LabError(
            f"{busybox} is not statically linked; run: sudo apt-get install "
            f"{tools.PACKAGE_OF['busybox']}"
        )
    entries = [cpio.directory(name) for name in _FOLDERS]
    entries += [cpio.symlink(name, f"tools/{name}") for name in _LOADER_FOLDERS]
    entries += [
        cpio.char_device("dev/console", 5, 1),
        cpio.regular("bin/busybox", program, 0o755),
        cpio.regular("init", INIT.encode(), 0o755),
    ]
    modules = kernel_part / "modules"
    for path in sorted(modules.iterdir()):
        entries.append(cpio.regular(f"modules/{path.name}", path.read_bytes()))
    return cpio.archive(entries)


@contextmanager
def extended(initrd: Path, entries: Sequence[cpio.ArchiveMember]) -> Iterator[Path]:
    """Yield the initramfs with an archive of a run's own behind it: the kernel unpacks both."""
    with tempfile.NamedTemporaryFile(prefix="nbdproxy-lab-", dir=temporary_folder()) as joined:
        joined.write(initrd.read_bytes())
        joined.write(cpio.archive(entries))
        joined.flush()
        yield Path(joined.name)


def _is_dynamic(program: bytes) -> bool:
    """Tell whether an ELF program asks for a loader."""
    magic, start, entry_size, count = _ELF_HEADER.unpack_from(program)
    if magic != b"\x7fELF":
        return True
    kinds = (
        struct.unpack_from("<I", program, start + index * entry_size)[0] for index in range(count)
    )
    return _PT_INTERP in kinds

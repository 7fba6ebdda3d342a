"""Whether this machine's kernel has a disk mounted for writing, and so changes it behind our back.

Of a file that is through a loop device. Sources: /sys/dev/block/N/loop/backing_file, and
/proc/self/mountinfo (proc_pid_mountinfo(5)), whose last field has the filesystem's own options.
Not covered: mounts of other mount namespaces, swap, and what stands between a disk and a mount:
device mapper, md, the further devices of a Btrfs.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path


def mounted_at(status: os.stat_result, root: Path = Path("/")) -> str | None:
    """Return where a file or block device is mounted for writing; None if nowhere.

    Raises OSError if there is no /proc to tell.
    """
    writable = _writable(root)
    for number in _numbers(status, root):
        for device in (number, *_partitions(root / "sys/dev/block" / number)):
            if device in writable:
                return writable[device]
    return None


def _writable(root: Path) -> dict[str, str]:
    """Return the mount points by the devices' numbers, as in "7:0"."""
    found: dict[str, str] = {}
    for line in os.fsdecode((root / "proc/self/mountinfo").read_bytes()).split("\n"):
        own, _, of_filesystem = line.partition(" - ")
        if not of_filesystem:
            continue
        kind, source, options = of_filesystem.split(" ", 2)
        if "rw" not in options.split(","):
            continue
        _, _, number, _, point, *_ = own.split(" ")
        numbers = {number}
        if kind == "btrfs":  # whose number is none of a device's
            numbers |= {*_numbers_of_node(root / _plain(source).lstrip("/"))}
        found |= dict.fromkeys(numbers, _plain(point))
    return found


def _plain(text: str) -> str:
    """Return a path of mountinfo, where spaces and the like are octal."""
    return re.sub(r"\\([0-7]{3})", lambda one: chr(int(one[1], 8)), text)


def _numbers_of_node(path: Path) -> list[str]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [_number(status)] if stat.S_ISBLK(status.st_mode) else []


def _number(status: os.stat_result) -> str:
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _numbers(status: os.stat_result, root: Path) -> list[str]:
    """Return a block device's number, or those of the loop devices that show a file."""
    if stat.S_ISBLK(status.st_mode):
        return [_number(status)]
    found = []
    for backing in (root / "sys/dev/block").glob("*/loop/backing_file"):
        try:
            if os.path.samestat(Path(backing.read_text().rstrip("\n")).stat(), status):
                found.append(backing.parents[1].name)
        except OSError:
            continue  # gone, or of another mount namespace
    return found


def _partitions(device: Path) -> list[str]:
    found = []
    for one in device.glob("*/partition"):
        with suppress(OSError):  # gone meanwhile
            found.append(one.parent.joinpath("dev").read_text().strip())
    return found

"""A real ext4 with a file in every condition that a disk can show, made without root."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nbdproxy.disks.file import FileDisk
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.ext4.filesystem import Filesystem
from nbdproxy.oracles.manifest import Manifest, from_directory

CONTENT = bytes(range(1, 251)) * 80  # 20,000 bytes without a zero
OLD = b"an earlier version"
SHOWN = [condition for condition in Condition if condition is not Condition.CANNOT_BE_TOLD]
UNDER = "/app/node_modules"


@dataclass(frozen=True, slots=True)
class Shown:
    """The image, what should be there, and what is: the files are named by their conditions."""

    image: Path
    manifest: Manifest
    earlier: Mapping[str, tuple[str, ...]]

    @property
    def expected(self) -> dict[str, Condition]:
        """The condition of each file."""
        return {f"{UNDER}/{condition}": condition for condition in SHOWN}


def make(folder: Path, size: str = "16M") -> Shown:
    """Make it in an empty folder."""
    modules = folder / "root/app/node_modules"
    modules.mkdir(parents=True)
    for condition in SHOWN:
        (modules / condition.value).write_bytes(CONTENT)
    image, old = folder / "image", folder / "old"
    old.write_bytes(OLD)
    options = ["-q", "-F", "-t", "ext4", "-b", "4096", "-d", str(folder / "root")]
    subprocess.run(["mke2fs", *options, str(image), size], check=True)
    commands = [
        f"cd {UNDER}",
        "rm missing",
        "set_inode_field empty size 0",
        *["punch zeroed 0 100", "fallocate zeroed 0 4"],  # unwritten, of full length
        "set_inode_field zeroed size 20000",
        "punch partly-zeroed 1 1",
        "set_inode_field short size 4097",
        "rm stale",
        f"write {old} stale",
        "set_inode_field damaged size 20001",
    ]
    done = subprocess.run(
        ["debugfs", "-w", "-f", "/dev/stdin", str(image)],
        input="\n".join(commands) + "\n",
        check=True,
        capture_output=True,
        text=True,
    )
    assert "No such file" not in done.stdout + done.stderr
    _break(image, f"{UNDER}/unreadable".encode())
    earlier = {f"{UNDER}/stale": (hashlib.sha256(OLD).hexdigest(),)}
    return Shown(image, from_directory(modules, under=UNDER), earlier)


def _break(image: Path, path: bytes) -> None:
    """Change an inode so that its checksum is wrong."""
    disk = FileDisk(image, read_only=True)
    filesystem = Filesystem(disk)
    node = filesystem.lookup(path)
    assert node is not None
    generation = filesystem.inode_offset(node.number) + 0x64
    disk.close()
    with image.open("r+b") as file:
        file.seek(generation)
        file.write(b"\x5a")

"""Runs in a guest, and fills its disks: `python -m tests.attacks.filling FOLDER KIND...`.

Each KIND is a filesystem, on the next disk of /dev/ubda, /dev/ubdb and so on, or `tmpfs`. What is
done to each is a method of `Disk`; what was seen of it goes to FOLDER/result.json, and is judged in
`test_full_disks`. Where a recorder has begun, little room is left on purpose: to fill a tail costs
more here than all the rest.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.nbd_client import FLUSH, WRITE, NbdClient, Op
from tests.support.proxies import Proxy
from tests.support.uml import ROOM

MIB = 1 << 20
CHUNK = 64 * 1024
IMAGE = 2 * MIB
SPARSE = 8 * MIB
"""Bytes of an image that has no room for all of its content."""
BURST = 8
ENOUGH = 40 * MIB
"""Bytes that have to be free for a recording to begin: its tails, and some more."""
LITTLE = 3 * MIB
"""Bytes that are left when it has begun; it takes 2 MiB at once."""
TAIL = 16 * MIB // CHUNK + 8
"""Writes after which each page of the recording's tail was written."""

Seen = dict[str, Any]
"""What a client wrote: numbers of writes that were `done` and `failed`; all `errors`; the server's
exit `code`."""


def chunk(number: int) -> bytes:
    """The content of write `number`."""
    return number.to_bytes(8, "big") * (CHUNK // 8)


def fill(client: NbdClient, first: int, last: int) -> Seen:
    """Write these numbers round and round, and flush, until it is refused or hung up on."""
    done: list[int] = []
    failed: list[int] = []
    errors: list[int] = []
    with suppress(OSError):
        for begin in range(first, last, BURST):
            numbers = range(begin, begin + BURST)
            ops = [Op(WRITE, one * CHUNK % client.size, data=chunk(one)) for one in numbers]
            cookies = dict(zip(client.send(*ops, Op(FLUSH)), numbers, strict=False))
            for _ in range(BURST + 1):
                cookie, reply = client.receive()
                if reply.error:
                    errors.append(reply.error)
                if cookie in cookies:
                    (failed if reply.error else done).append(cookies[cookie])
            if errors:
                break
    return {"done": done, "failed": failed, "errors": errors}


class Disk:
    """A filesystem that is filled, and the folder for what is seen."""

    def __init__(self, kind: str, mounted: Path, folder: Path) -> None:
        self.kind = kind
        self.mounted = mounted
        self.folder = folder

    def free(self) -> int:
        """How many bytes are left."""
        found = os.statvfs(self.mounted)
        return found.f_bavail * found.f_frsize

    def leave(self, count: int) -> None:
        """Give or take room, until about `count` bytes are left."""
        with (self.mounted / "ballast").open("ab") as file:
            if self.free() < count:
                file.truncate(0)
                os.sync()
            for _ in range(9):
                rest = self.free() - count
                if rest < CHUNK:
                    break
                with suppress(OSError):  # the filesystem may need more than that itself
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, rest)
                os.sync()

    def leave_nothing(self) -> None:
        """Take all room."""
        self.leave(0)
        with (self.mounted / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def folder_of(self, name: str) -> Path:
        """Where a server's log, and what it left, is found afterwards."""
        return self.folder / f"{self.kind}-{name}"

    def serving(
        self, name: str, image: Path, *words: str | Path, environment: Mapping[str, str] = {}
    ) -> Proxy:
        """A server."""
        return Proxy(self.folder_of(name), image, *words, environment=environment)

    def save(self, name: str, path: Path) -> None:
        """Put something into the folder, and remove it here."""
        kept = self.folder_of(name) / path.name
        subprocess.run(["cp", "-r", "--sparse=always", path, kept], check=True)
        subprocess.run(["rm", "-r", path], check=True)

    def record(
        self,
        name: str,
        words: Sequence[str] = (),
        attack: Callable[[Path], object] | None = None,
    ) -> Seen:
        """Record to it until it is full, and leave `run` behind."""
        self.leave(ENOUGH)
        run, first = self.mounted / "run", 0
        with self.serving(name, new_image(), "--record", run, *words) as server:
            client = server.client()
            if attack is not None:
                fill(client, 0, TAIL)
                attack(run)
                first = TAIL
            self.leave(LITTLE if attack is None else MIB)  # so little that a tail wants more
            seen = fill(client, first, first + 2 * TAIL)
            if name == "killed":
                server.kill()
            client.drop()
            seen["code"] = server.wait()
        self.save(name, run)
        return seen

    def copied(self) -> Seen:
        """The same, when the recording's blocks have come to be shared with a copy of it."""

        def copy(run: Path) -> None:
            words: list[str | Path] = ["cp", "-r", "--reflink=always", run]
            if self.kind == "btrfs":  # what is written in place is not copied, but in a snapshot
                words = ["btrfs", "-q", "subvolume", "snapshot", self.mounted]
            subprocess.run([*words, self.mounted / "copy"], check=True, stdout=subprocess.DEVNULL)

        return self.record("copied", attack=copy)

    def image(self) -> Seen:
        """Write to a sparse image on it; leaves `image` and `run` behind."""
        self.leave(LITTLE)
        image, run = self.mounted / "image", ROOM / "run"
        new_image(image, SPARSE)
        with self.serving("image", image, "--record", run) as server:
            with server.client() as client:
                seen = fill(client, 0, SPARSE // CHUNK)
            seen["code"] = server.stop()
        self.save("image", image)
        self.save("image", run)
        return seen

    def log(self) -> Seen:
        """Fill the disk of the server's log; the recording and the image lie elsewhere."""
        self.leave(MIB)
        folder, log = self.folder_of("log"), self.mounted / "log"
        folder.mkdir()
        log.touch()
        (folder / "err").symlink_to(log)
        with self.serving("log", new_image(), "--record", ROOM / "run") as server:
            self.leave_nothing()
            for _ in range(100):
                with socket.socket(socket.AF_UNIX) as knock:
                    knock.connect(str(server.socket))
                    knock.sendall(bytes(64))
                    while knock.recv(4096):
                        pass
            with server.client() as client:
                seen = fill(client, 0, BURST)
            seen["code"] = server.stop()
        (folder / "err").unlink()
        self.save("log", log)
        self.save("log", ROOM / "run")
        return seen

    def scratch(self) -> Seen:
        """Fill the disk of the server's temporary files, where an overlay's writes go."""
        self.leave(LITTLE)
        words = ("--overlay", "--record", ROOM / "run")
        where = {"TMPDIR": str(self.mounted)}
        image = new_image(ROOM / "image", SPARSE)
        with self.serving("scratch", image, *words, environment=where) as server:
            with server.client() as client:
                seen = fill(client, 0, SPARSE // CHUNK)
            seen["code"] = server.stop()
        self.save("scratch", ROOM / "run")
        return seen


def new_image(path: Path = ROOM / "image", size: int = IMAGE) -> Path:
    """Make an empty image."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


Attack = Callable[[Disk], Seen]
_killed, _image = partial(Disk.record, name="killed"), Disk.image
ATTACKS: dict[str, dict[str, Attack]] = {
    "ext4": {
        "full": partial(Disk.record, name="full"),
        "synced": partial(Disk.record, name="synced", words=("--sync-recording",)),
        "killed": _killed,
        "image": _image,
        "log": Disk.log,
    },
    "xfs": {"killed": _killed, "image": _image, "copied": Disk.copied},
    "btrfs": {"killed": _killed, "image": _image, "copied": Disk.copied},
    "tmpfs": {"full": partial(Disk.record, name="full"), "scratch": Disk.scratch},
}
"""What is done to each kind of filesystem, in turn; a copy is last, as it keeps its room.

A server's start is what costs time here."""


def mount(kinds: list[str]) -> Iterator[tuple[str, Path]]:
    """Mount them, one after the other."""
    for number, kind in enumerate(kinds):
        where = ROOM / kind
        where.mkdir()
        device = "none" if kind == "tmpfs" else f"/dev/ubd{chr(ord('a') + number)}"
        options = ("-o", "size=64M") if kind == "tmpfs" else ()
        subprocess.run(["mount", "-t", kind, *options, device, where], check=True)
        yield kind, where


def main(folder: Path, kinds: list[str]) -> None:
    """Do all of it."""
    seen = {}
    for kind, where in mount(kinds):
        disk = Disk(kind, where, folder)
        for name, attack in ATTACKS[kind].items():
            seen[f"{kind}-{name}"] = attack(disk)
    (folder / "result.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

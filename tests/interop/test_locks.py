"""An image has one writer, or readers: between nbdproxy and QEMU's programs of all kinds.

What users see of it with qemu-io is in tests/server/test_locks.py, this is the breadth.
Not covered: block devices (QEMU takes the same locks on them), and filesystems that have their own
opinion of locks, as NFS and GlusterFS do.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import ImageError
from tests.support.nbd_client import WRITE, Op
from tests.support.serving import DEADLINE_S, Server, nbdproxy, tool, until

MIB = 1 << 20

GUEST = ("qemu-system-x86_64", "-M", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S")


def node(image: Path, *, read_only: bool = False) -> str:
    """The description of a block node."""
    mode = "on" if read_only else "off"
    return f"driver=file,node-name=n,filename={image},read-only={mode}"


def daemon(image: Path, *, read_only: bool) -> list[str]:
    """A qemu-storage-daemon with an export."""
    writable = "off" if read_only else "on"
    return [
        *("qemu-storage-daemon", "--blockdev", node(image, read_only=read_only)),
        *("--nbd-server", f"addr.type=unix,addr.path={image.parent}/qsd"),
        *("--export", f"nbd,id=e,node-name=n,writable={writable}"),
    ]


def guest(image: Path, *options: str, read_only: bool) -> list[str]:
    """A guest with the disk, which has not been started yet."""
    blockdev = ("-blockdev", node(image, read_only=read_only))
    return [*GUEST, *blockdev, "-device", ",".join(("virtio-blk-pci,drive=n", *options))]


WRITERS: dict[str, Callable[[Path], Sequence[str]]] = {
    "qemu-storage-daemon": lambda image: daemon(image, read_only=False),
    "qemu-nbd": lambda image: [
        "qemu-nbd",
        "-t",
        "-f",
        "raw",
        "-k",
        f"{image.parent}/q",
        f"{image}",
    ],
    "qemu-io": lambda image: ["qemu-io", "-f", "raw", f"{image}"],
    "qemu-system-x86_64": lambda image: guest(image, read_only=False),
    "qemu-system-x86_64, which shares": lambda image: guest(image, "share-rw=on", read_only=False),
}
READERS: dict[str, Callable[[Path], Sequence[str]]] = {
    "qemu-storage-daemon": lambda image: daemon(image, read_only=True),
    "qemu-nbd": lambda image: [
        "qemu-nbd",
        "-tr",
        "-f",
        "raw",
        "-k",
        f"{image.parent}/q",
        f"{image}",
    ],
    "qemu-io": lambda image: ["qemu-io", "-r", "-f", "raw", f"{image}"],
}


@contextmanager
def running(words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of QEMU's that stays; its stdin is a pipe."""
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def locked(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether it has taken locks as on an image, and so is past its own look at ours."""
    assert process.poll() is None, "it has ended"
    folder = Path(f"/proc/{process.pid}/fdinfo")
    try:
        held = [info.read_text() for info in folder.iterdir()]
    except OSError:
        return False  # one was closed meanwhile
    return any("lock:" in info and "OFDLCK" in info for info in held)


def is_free(image: Path) -> bool:
    """Tell whether nobody has locks on an image."""
    try:
        FileDisk(image).close()
    except ImageError:
        return False
    return True


@contextmanager
def holding(words: Sequence[str], image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of QEMU's until it has the image."""
    with running(words) as process:
        until(lambda: locked(process), f"{words[0]} has the image")
        yield process


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.mark.parametrize("writer", WRITERS)
def test_an_image_that_qemu_writes_is_refused_and_the_program_named(
    image: Path, writer: str
) -> None:
    with holding(WRITERS[writer](image), image) as process:
        name = f"({writer.partition(',')[0]}, process {process.pid})"
        for read_only, what in ((False, "has it open"), (True, "may write it")):
            with pytest.raises(ImageError) as refused:
                FileDisk(image, read_only=read_only)
            assert f"{image} is in use by " in str(refused.value)
            assert f"{name}, which {what}; end that one first" in str(refused.value)
    FileDisk(image).close()


@pytest.mark.parametrize("reader", READERS)
def test_an_image_that_qemu_reads_may_be_read(image: Path, reader: str) -> None:
    with holding(READERS[reader](image), image):
        FileDisk(image, read_only=True).close()


def test_a_guest_that_reads_an_image_keeps_writers_out_and_readers_not(image: Path) -> None:
    with holding(guest(image, read_only=True), image):
        FileDisk(image, read_only=True).close()
        with pytest.raises(ImageError, match="which has it open"):
            FileDisk(image)


def test_a_recording_is_not_read_over_an_image_that_qemu_writes(
    image: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Server(image, "--record", run, "--overlay") as server:
        assert server.client().do(Op(WRITE, 0, data=b"x" * 4096))[0].error == 0
        assert server.stop() == 0
    with holding(daemon(image, read_only=False), image):
        for words in (
            ("serve", image, "--record", tmp_path / "other", "--run", "true"),
            ("open", run, "--at", "end", "-o", tmp_path / "state"),
            ("check", run),
            ("manifest", f"{run}@end"),
        ):
            done = nbdproxy(*words, code=2)
            assert f"nbdproxy: {image} is in use by " in done.stderr, words
            assert "(qemu-storage-daemon, process " in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("options", [(), ("--read-only",), ("--overlay",)])
def test_an_image_that_is_served_is_not_opened_by_qemu_for_writing(
    image: Path, options: tuple[str, ...]
) -> None:
    with Server(image, *options) as server:
        for writer, words in list(WRITERS.items())[: None if not options else 3]:
            done = subprocess.run(
                words(image), input=b"", capture_output=True, timeout=DEADLINE_S, check=False
            )
            assert done.returncode == 1, writer
            assert b'Failed to get "write" lock' in done.stderr, writer
        tool("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", image)
        assert server.stop() == 0
    tool("qemu-io", "-f", "raw", "-c", "write 0 512", image)


def test_a_guest_may_read_an_image_that_is_only_read(image: Path) -> None:
    with Server(image, "--overlay"), holding(guest(image, read_only=True), image):
        pass
    with Server(image):
        done = subprocess.run(
            guest(image, read_only=True), capture_output=True, timeout=DEADLINE_S, check=False
        )
    assert b'Failed to get shared "write" lock' in done.stderr


def ask(monitor: subprocess.Popen[bytes], command: str, **arguments: object) -> dict[str, Any]:
    """Give QEMU's monitor a command and return the answer."""
    assert monitor.stdin is not None and monitor.stdout is not None
    monitor.stdin.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    monitor.stdin.flush()
    while line := monitor.stdout.readline():
        answer = json.loads(line)
        if "return" in answer or "error" in answer:
            return dict(answer)
    raise AssertionError("QEMU has ended")


def test_qemu_that_only_knows_an_image_is_refused_when_it_begins_to_write(
    image: Path, tmp_path: Path
) -> None:
    words = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-S", "-qmp", "stdio"]
    with running([*words, "-blockdev", node(image)]) as qemu:
        ask(qemu, "qmp_capabilities")
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
        assert "return" in ask(qemu, "nbd-server-start", addr=address)
        export = {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
        with Server(image):
            refused = ask(qemu, "block-export-add", **export)
            assert refused["error"]["desc"] == 'Failed to get "write" lock'
        assert "return" in ask(qemu, "block-export-add", **export)
        with pytest.raises(ImageError, match="qemu-system-x86_64, process"):
            FileDisk(image)


def test_a_qcow2_file_that_is_served_is_locked_too_and_honours_locks(tmp_path: Path) -> None:
    """There it is nbdproxy's own qemu-storage-daemon that opens it."""
    image = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "16M")
    words = ["qemu-io", "-f", "qcow2", str(image)]
    with Server(image, "--format", "qcow2"):
        done = subprocess.run(
            words, input=b"", capture_output=True, timeout=DEADLINE_S, check=False
        )
        assert b'Failed to get "write" lock' in done.stderr
        with pytest.raises(ImageError, match=r"\(qemu-storage-daemon, process"):
            FileDisk(image)
    until(lambda: is_free(image), "the server's own daemon is gone")
    for options in ((), ("--read-only",), ("--overlay",)):
        with holding(words, image) as process:
            refused = nbdproxy("serve", image, "--format", "qcow2", *options, code=2).stderr
            assert f"nbdproxy: {image} is in use by " in refused
            assert f"(qemu-io, process {process.pid})" in refused


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_another_name_of_an_image_is_the_same_image(
    image: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    other = tmp_path / "other"
    link(other, image)
    with Server(image) as server:
        refused = nbdproxy("serve", other, "--socket", tmp_path / "s", code=2).stderr
        assert f"nbdproxy: {other} is in use by another nbdproxy" in refused
        assert f", process {server.process.pid}), which has it open" in refused
        assert f"{other} is in use" in nbdproxy("check", other, code=2).stderr


def flocked(image: Path) -> bool:
    """Tell whether somebody has flock(2) on a file."""
    with image.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_no_lock_of_all_bytes_is_taken_where_there_are_locks_of_bytes(image: Path) -> None:
    """NFS and GlusterFS would keep QEMU's readers out, and udev probes a device with such a one."""
    with closing(FileDisk(image)):
        assert not flocked(image)


def test_where_there_are_no_locks_of_bytes_all_bytes_are_locked(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, command: int, argument: bytes) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", none)
    with (
        closing(FileDisk(image, read_only=True)),
        closing(FileDisk(image, read_only=True)),
        pytest.raises(ImageError, match="in use by another nbdproxy"),
    ):
        FileDisk(image)
    with closing(FileDisk(image)), pytest.raises(ImageError, match="which may write it"):
        FileDisk(image, read_only=True)


def test_where_there_are_no_locks_an_image_is_served_all_the_same(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, *_: object) -> bytes:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "fcntl", none)
    monkeypatch.setattr(fcntl, "flock", none)
    FileDisk(image).close()

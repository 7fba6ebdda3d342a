"""The guest's disk in an image file: qemu-storage-daemon reads and writes the format for us."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.formats import FORMATS, ImageFormat, format_of_file
from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.errors import ImageError
from nbdproxy.nbd.uri import NbdUri

_DAEMON = "qemu-storage-daemon"
_START_S = 10
_END_S = 10
_RETRY_S = 0.01


@asynccontextmanager
async def guests_view(image: Path, form: ImageFormat, *, read_only: bool) -> AsyncIterator[NbdUri]:
    """Serve what a guest would see of an image file, for as long as the block runs.

    Raises ImageError if the file has another format, or QEMU cannot open it.
    """
    _check(image, form, read_only=read_only)
    with tempfile.TemporaryDirectory(prefix=f"nbdproxy-{form}-", dir=temporary_folder()) as folder:
        path = Path(folder, "socket")
        said = Path(folder, "stderr")
        daemon = _start(image, form, path, said, read_only=read_only)
        try:
            await _wait_until_up(daemon, path, said, image)
            yield NbdUri(socket=str(path))
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_end, daemon)


def _check(image: Path, form: ImageFormat, *, read_only: bool) -> None:
    if not image.exists():
        raise ImageError(f"there is no image at {image}; check the path")
    if any("\udc80" <= character <= "\udcff" for character in str(image)):
        raise ImageError(
            f"{image} is not UTF-8, and QEMU opens no such path; rename it, or serve a link to it"
        )
    found = format_of_file(image)
    if found is not form:
        what = "" if found is None else f" but {FORMATS[found].said}"
        raise ImageError(
            f"{image} is not {FORMATS[form].said}{what}; check the path, or drop --format {form}"
        )
    if form is ImageFormat.LUKS:
        raise ImageError(
            f"{image} is {FORMATS[form].said}, and its key is needed: serve it with qemu-nbd "
            "(--object secret,... --image-opts driver=luks,key-secret=...) and name the URI of that"
        )
    if not (read_only or FORMATS[form].writable):
        raise ImageError(
            f"{image} is {FORMATS[form].said}, which QEMU can only read; add --read-only or "
            "--overlay"
        )
    FileDisk(image, read_only=read_only).close()  # says who has it, as QEMU does not


def _start(
    image: Path, form: ImageFormat, path: Path, said: Path, *, read_only: bool
) -> subprocess.Popen[bytes]:
    program = shutil.which(_DAEMON)
    if program is None:
        raise ImageError(
            f"{_DAEMON} is not installed, and {form} needs it: apt-get install qemu-system-common "
            "(or qemu-utils)"
        )
    common = {"read-only": read_only, "discard": "unmap"}
    driver = "host_device" if image.is_block_device() else "file"
    file = {"driver": driver, "filename": str(image.absolute()), **common}
    node = {"driver": str(form), "node-name": "disk", "file": file, **common}
    export = {"type": "nbd", "id": "disk", "node-name": "disk", "name": ""}
    command = [
        *(program, "--blockdev", json.dumps(node)),
        *("--nbd-server", json.dumps({"addr": {"type": "unix", "path": str(path)}})),
        *("--export", json.dumps({**export, "writable": not read_only})),
    ]
    # If we are killed, it must not keep the file; and Ctrl-C is for us, not for it.
    if guard := shutil.which("setpriv"):
        command = [guard, "--pdeathsig", "TERM", *command]
    with said.open("wb") as stderr:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )


async def _wait_until_up(
    daemon: subprocess.Popen[bytes], path: Path, said: Path, image: Path
) -> None:
    with trio.move_on_after(_START_S):
        while daemon.poll() is None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if path.exists() and probe.connect_ex(str(path)) == 0:
                    return
            await trio.sleep(_RETRY_S)
    daemon.kill()
    words = said.read_text(errors="replace").strip().splitlines()
    reason = words[-1].removeprefix(f"{_DAEMON}: ") if words else "it did not start in time"
    raise ImageError(f"{image} cannot be opened by {_DAEMON}: {reason}")


def _end(daemon: subprocess.Popen[bytes]) -> None:
    """End it in order, so that it writes its caches back."""
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(_END_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()

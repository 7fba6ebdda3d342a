"""The servers that are measured: how each is started on images of its own, and its version.

Every server gets the same: Unix sockets, raw images, everything switched on that its command line
offers. A `Setup` that a server cannot have is `AbsentError`, which the report prints as "no".

Not covered: TCP, vsock, pre-shared keys, other plugins of nbdkit than `file`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.blackbox.wire import AbsentError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Setup:
    """What a server shall serve, and how.

    exports: names, one image each; size: bytes of each image;
    tls: off, allow or require; verify_peer: whether clients have to show a certificate;
    anybody: whether it shall know no authority for clients' certificates;
    upstream: the URI of another NBD server, whose export is served instead of an image.
    """

    exports: tuple[str, ...] = ("disk",)
    read_only: bool = False
    tls: str = "off"
    verify_peer: bool = False
    anybody: bool = False
    size: int = 64 * MIB
    upstream: str = ""


PLAIN = Setup()
NAMED = Setup(exports=("alpha",))
SEVERAL = Setup(exports=("alpha", "beta"))
UNNAMED = Setup(exports=("",))
FOREIGN = Setup(exports=("größe 日本",))
READ_ONLY = Setup(read_only=True)
BIG = Setup(size=8 << 30)
TLS_ALLOW = Setup(tls="allow")
TLS_REQUIRE = Setup(tls="require")
TLS_ANYBODY = Setup(tls="require", anybody=True)
TLS_VERIFY = Setup(tls="require", verify_peer=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is to run: a folder of its own, its socket, an image for each export."""

    folder: Path
    setup: Setup
    images: dict[str, Path]
    certificates: Path

    @property
    def socket(self) -> Path:
        """The Unix socket to listen on."""
        return self.folder / "socket"

    @property
    def pid_file(self) -> Path:
        """Where a server that goes to the background writes its process's number."""
        return self.folder / "pid"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of server.

    command: makes the command line, and the configuration file where one is needed;
    daemon: whether it goes to the background and writes a pid file.
    """

    name: str
    version: Callable[[], str]
    command: Callable[[Place], list[str]]
    daemon: bool = False


_PACKAGE = {"nbdkit": "nbdkit", "qemu-nbd": "qemu-utils", "nbd-server": "nbd-server"}


def _first_number(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"{' '.join(words)} tells no version: {done.stdout}{done.stderr}")
    return found[0]


def _program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(
            f"{name} is not installed; Debian: apt-get install {_PACKAGE[name]}"
        )
    return found


def _nbdproxy(place: Place) -> list[str]:
    setup = place.setup
    sources = [setup.upstream] if setup.upstream else map(str, place.images.values())
    words = [sys.executable, "-m", "nbdproxy", "serve", *sources]
    words += ["--socket", str(place.socket)]
    for name in setup.exports:
        words += ["--export", name] if name or len(setup.exports) > 1 else []
    words += ["--read-only"] if setup.read_only else []
    if setup.tls != "off":
        words += ["--tls", setup.tls, "--tls-certificates", str(place.certificates)]
    return [*words, "--tls-verify-peer"] if setup.verify_peer else words


def _nbdkit(place: Place) -> list[str]:
    setup = place.setup
    words = [_program("nbdkit"), "--foreground", "--unix", str(place.socket)]
    words += ["--readonly"] if setup.read_only else []
    if setup.tls != "off":
        mode = "on" if setup.tls == "allow" else "require"
        words += [f"--tls={mode}", f"--tls-certificates={place.certificates}"]
    words += ["--tls-verify-peer"] if setup.verify_peer else []
    if setup.upstream:
        return [*words, "nbd", f"uri={setup.upstream}"]
    if setup.exports in {PLAIN.exports, UNNAMED.exports}:
        return [*words, "file", str(place.images[setup.exports[0]])]
    # Only with a folder does it look at the export's name.
    return [*words, "file", f"dir={next(iter(place.images.values())).parent}"]


def _qemu_nbd(place: Place) -> list[str]:
    setup = place.setup
    if len(setup.exports) > 1:
        raise AbsentError("qemu-nbd serves one export")
    if setup.tls == "allow":
        raise AbsentError("qemu-nbd has TLS off or required, not optional")
    words = [_program("qemu-nbd"), "--persistent", "--shared=0", f"--socket={place.socket}"]
    words += ["--format=raw", "--discard=unmap", "--description=image through qemu-nbd"]
    words += [f"--export-name={setup.exports[0]}"] if setup.exports[0] else []
    words += ["--read-only"] if setup.read_only else []
    if setup.tls != "off":
        verify = "on" if setup.verify_peer else "off"
        folder = f"dir={place.certificates},endpoint=server,verify-peer={verify}"
        words += ["--object", f"tls-creds-x509,id=tls,{folder}", "--tls-creds=tls"]
    return [*words, setup.upstream or str(place.images[setup.exports[0]])]


def _nbd_server(place: Place) -> list[str]:
    setup = place.setup
    if "" in setup.exports:
        raise AbsentError("nbd-server's exports are named")
    if setup.upstream:
        raise AbsentError("nbd-server serves files alone")
    lines = ["[generic]", f"unixsock = {place.socket}", "allowlist = true"]
    if setup.tls != "off":
        folder = place.certificates
        lines += [f"certfile = {folder}/server-cert.pem", f"keyfile = {folder}/server-key.pem"]
        lines += [f"force_tls = {'true' if setup.tls == 'require' else 'false'}"]
        # Without it, it closes every connection once TLS runs; with it, it verifies clients.
        lines += [] if setup.anybody else [f"cacertfile = {folder}/ca-cert.pem"]
    for name, image in place.images.items():
        lines += [f"[{name}]", f"exportname = {image}", "flush = true", "fua = true"]
        lines += ["trim = true", f"readonly = {'true' if setup.read_only else 'false'}"]
    config = place.folder / "config"
    config.write_text("\n".join(lines) + "\n")
    return [_program("nbd-server"), "-C", str(config), "-p", str(place.pid_file)]


OURS = Kind(
    "nbdproxy", lambda: _first_number(sys.executable, "-m", "nbdproxy", "--version"), _nbdproxy
)
PEERS = (
    Kind("nbdkit", lambda: _first_number(_program("nbdkit"), "--version"), _nbdkit),
    Kind("qemu-nbd", lambda: _first_number(_program("qemu-nbd"), "--version"), _qemu_nbd),
    Kind(
        "nbd-server", lambda: _first_number(_program("nbd-server"), "-V"), _nbd_server, daemon=True
    ),
)
KINDS = {kind.name: kind for kind in (OURS, *PEERS)}

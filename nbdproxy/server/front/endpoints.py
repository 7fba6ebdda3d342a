"""Where clients connect: a Unix socket that only its owner may use, or TCP.

TCP beyond loopback needs TLS, or the user's word that none is wanted.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nbdproxy.errors import NbdproxyError, UsageError
from nbdproxy.nbd import codec
from nbdproxy.nbd.constants import NBD_PORT
from nbdproxy.peers import peer_of
from nbdproxy.private import check_folder

_BACKLOG = 128
_STALE_S = 0.05
"""Seconds between two looks at a socket that nobody listens at."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A listening, non-blocking socket and what clients call it. Closing it is the owner's job.

    file  device and inode of a Unix socket's file
    """

    sock: socket.socket
    path: Path | None
    host: str
    port: int
    file: tuple[int, int] | None = None

    def uri(self, export: str, *, tls: bool = False) -> str:
        """Return the NBD URI of an export behind this endpoint (NBD URI specification)."""
        name = quote(codec.encode_name(export), safe="")
        scheme = "nbds" if tls else "nbd"
        if self.path is not None:
            return f"{scheme}+unix:///{name}?socket={quote(str(self.path))}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == NBD_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{name}"

    def client(self, sock: socket.socket) -> str:
        """Return how an accepted client is called in the recording."""
        if self.path is None:
            host, port = sock.getpeername()[:2]
            return f"tcp {host}:{port}"
        pid, uid = peer_of(sock)
        return f"unix pid {pid} uid {uid}"

    def close(self) -> None:
        """Remove the socket's file and stop listening; closing twice is harmless.

        What is another server's by now is left alone. As long as we listen nobody takes the path
        for free, and the file's inode is no other file's.
        """
        if self.sock.fileno() < 0:
            return
        with suppress(OSError):
            if self.path is not None and _identity(self.path) == self.file:
                self.path.unlink()
        self.sock.close()


def listen_unix(path: Path, *, option: str = "--socket") -> Endpoint:
    """Listen on a Unix socket with mode 0600; a stale one, nobody behind it, is replaced.

    `option` is what the user named it with. Raises UnsafeFolderError where others could put a
    socket of theirs in its place, and get what is meant for this one.
    """
    path = path.absolute()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        check_folder(path.parent)
        _remove_stale(path, option)
        sock.bind(str(path))
        file = _identity(path)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except NbdproxyError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        # A path that is too long is told without a number.
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {path}: {reason}; choose another {option}") from None
    finally:
        os.umask(old_mask)
    return Endpoint(sock, path, "", 0, file)


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _remove_stale(path: Path, option: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} exists and is not a socket; choose another {option}")
    # One that has bound it and does not listen yet looks like one that is gone.
    for pause_s in (_STALE_S, 0):
        found = _identity(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except BlockingIOError:  # somebody listens, and lets nobody in
                pass
            except ConnectionRefusedError:
                time.sleep(pause_s)
                continue
            except OSError as error:
                raise UsageError(f"{path} cannot be used: {error.strerror}") from None
        raise UsageError(f"{path} is in use by another server; end it, or choose another {option}")
    if _identity(path) == found:
        path.unlink()


def listen_tcp(address: str, *, anywhere: bool = False) -> Endpoint:
    """Listen on HOST:PORT, which must be loopback unless `anywhere`; HOST is an IP address."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{address} is not HOST:PORT; write for example 127.0.0.1:{NBD_PORT}")
    if host == "localhost":
        host = "127.0.0.1"
    if not (anywhere or is_loopback(host)):
        raise UsageError(
            f"{host} is not a loopback address, so anybody could come and listen in: add --tls "
            "require --tls-verify-peer, or --insecure if that is what you want, or use 127.0.0.1 "
            "or a Unix socket"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, int(port)))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        in_use = error.errno == errno.EADDRINUSE
        hint = "it is in use; choose another port" if in_use else error.strerror
        raise UsageError(f"cannot listen on {address}: {hint}") from None
    return Endpoint(sock, None, host, sock.getsockname()[1])


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address; a name is not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

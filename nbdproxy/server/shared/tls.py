"""TLS with X.509 certificates, in a folder laid out as nbdkit, QEMU and libnbd lay it out.

A server's folder has `ca-cert.pem`, `server-cert.pem` and `server-key.pem`; a client's has
`ca-cert.pem` and, where the server asks for one, `client-cert.pem` and `client-key.pem`. A list of
revoked certificates, `ca-crl.pem`, is honoured if it is there. TLS 1.2 is the least.

A folder or file that another user could change or exchange is refused (see `nbdproxy.private`).
Not covered: who may read a key.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from nbdproxy.errors import UsageError
from nbdproxy.nbd.constants import TlsMode
from nbdproxy.private import check_file, check_folder

CA, CRL = "ca-cert.pem", "ca-crl.pem"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server does about TLS; `context` is set unless the mode is off."""

    mode: TlsMode = TlsMode.OFF
    context: ssl.SSLContext | None = None

    @property
    def knows_clients(self) -> bool:
        """Whether clients in TLS have to show a certificate."""
        return self.context is not None and self.context.verify_mode is ssl.CERT_REQUIRED


def server_tls(mode: TlsMode, certificates: Path | None, *, verify_peer: bool) -> ServerTls:
    """Load a server's certificates; UsageError says which file is missing or wrong.

    Raises UnsafeFolderError for what others could change, as `client_context` does.
    """
    if mode is TlsMode.OFF:
        if certificates is not None or verify_peer:
            raise UsageError("certificates are only used with --tls allow or --tls require")
        return ServerTls()
    if certificates is None:
        raise UsageError("--tls needs --tls-certificates DIR, with server-cert.pem in it")
    _check_folder(certificates)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_chain(context, certificates, "server")
    if verify_peer:
        _load_authority(context, certificates)
        context.verify_mode = ssl.CERT_REQUIRED
    return ServerTls(mode, context)


def client_context(certificates: Path | None, *, verify_peer: bool) -> ssl.SSLContext:
    """Return what a client needs; without a folder the system's authorities are trusted."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificates is not None:
        _check_folder(certificates)
        if verify_peer:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            _load_authority(context, certificates)
        if (certificates / "client-cert.pem").exists():
            _load_chain(context, certificates, "client")
    return context


def _load_chain(context: ssl.SSLContext, folder: Path, role: str) -> None:
    certificate, key = folder / f"{role}-cert.pem", folder / f"{role}-key.pem"
    for path in (certificate, key):
        _check_file(path)
    try:
        # A key with a passphrase must not make us ask for it on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise UsageError(
            f"{certificate} and {key} cannot be used: {reason}; they must be PEM, belong to "
            "each other, and have no passphrase"
        ) from None


def _load_authority(context: ssl.SSLContext, folder: Path) -> None:
    for name in (CA, CRL):
        path = folder / name
        if name == CRL and not path.exists():
            continue
        _check_file(path)
        try:
            context.load_verify_locations(path)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(f"{path} is not a PEM file of certificates: {error}") from None
        if name == CRL:
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def _check_folder(path: Path) -> None:
    try:
        check_folder(path)
    except OSError as error:
        raise UsageError(
            f"{path} is no folder of certificates ({error.strerror}); name the one that has {CA}"
        ) from None


def _check_file(path: Path) -> None:
    try:
        check_file(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); a folder of certificates is laid out as "
            "for nbdkit and QEMU"
        ) from None

"""X.509 certificates in folders as nbdkit, QEMU and libnbd lay them out, made with `openssl`.

Elliptic keys, because they are made in a moment; valid for two days. What is made is the least
that shows each way in which a certificate can be right or wrong; nothing of it is worth keeping.
"""

from __future__ import annotations

import shutil
import ssl
from dataclasses import dataclass
from pathlib import Path

from tests.support.serving import tool

PASSPHRASE = "sesame"

_CONFIG = """\
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
[ledger]
database = {folder}/ledger
default_md = sha256
default_crl_days = 2
"""


@dataclass(frozen=True, slots=True)
class Certificates:
    """Folders; each has `ca-cert.pem` and the certificates and keys of `server` and `client`.

    good        all is as it should be
    foreign     the same of another authority
    revoked     of the good authority, but the client's certificate is in its list
    revoking    the good server's, with the list `ca-crl.pem`
    anonymous   the good authority's certificate alone
    mismatched  the good server's certificate with the foreign one's key
    locked      the good server's, its key behind a passphrase
    """

    good: Path
    foreign: Path
    revoked: Path
    revoking: Path
    anonymous: Path
    mismatched: Path
    locked: Path


def make_certificates(folder: Path) -> Certificates:
    """Fill a new folder; takes a tenth of a second for each pair."""
    made = Certificates(*(folder / name for name in Certificates.__slots__))
    for authority in (made.good, made.foreign):
        _make_authority(authority)
        for role in ("server", "client"):
            _make_pair(authority, role, signer=authority)
    shutil.copytree(made.good, made.revoked)
    _make_pair(made.revoked, "client", signer=made.good)
    shutil.copytree(made.good, made.revoking)
    _revoke(made.good, made.revoked / "client-cert.pem", made.revoking / "ca-crl.pem")
    made.anonymous.mkdir()
    shutil.copy(made.good / "ca-cert.pem", made.anonymous)
    shutil.copytree(made.good, made.mismatched)
    shutil.copy(made.foreign / "server-key.pem", made.mismatched)
    shutil.copytree(made.good, made.locked)
    key = made.locked / "server-key.pem"
    tool("openssl", "ec", "-in", key, "-out", key, "-aes128", "-passout", f"pass:{PASSPHRASE}")
    return made


def client_context(folder: Path) -> ssl.SSLContext:
    """Return what a client with this folder would use, checking the server's name and all."""
    context = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
    if (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context


def _make(folder: Path, name: str, section: str, *more: str | Path) -> None:
    config = folder / "openssl.cnf"
    config.write_text(_CONFIG.format(folder=folder))
    tool(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-sha256", "-days", "2", "-config", config, "-extensions", section),
        *("-subj", f"/CN={'localhost' if section == 'server' else section}"),
        *("-keyout", folder / f"{name}-key.pem", "-out", folder / f"{name}-cert.pem", *more),
    )


def _make_authority(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "ledger").touch()
    _make(folder, "ca", "ca")


def _make_pair(folder: Path, role: str, *, signer: Path) -> None:
    authority = ("-CA", signer / "ca-cert.pem", "-CAkey", signer / "ca-key.pem")
    _make(folder, role, role, *authority)


def _revoke(authority: Path, certificate: Path, revoked: Path) -> None:
    common = (
        *("openssl", "ca", "-config", authority / "openssl.cnf", "-name", "ledger"),
        *("-keyfile", authority / "ca-key.pem", "-cert", authority / "ca-cert.pem"),
    )
    tool(*common, "-revoke", certificate)
    tool(*common, "-gencrl", "-out", revoked)

"""A folder of X.509 certificates, as NBD servers expect it, made with the `openssl` command.

`ca-cert.pem`, `server-cert.pem` and `-key.pem` for localhost, `client-cert.pem` and `-key.pem`; and
`stranger-*.pem`, a client whom another authority vouches for. Valid for a few days.

Not covered: revocation, and keys in agents or tokens.
"""

from __future__ import annotations

import ssl
import subprocess
import warnings
from pathlib import Path

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
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = clientAuth
"""


def _make(folder: Path, name: str, section: str, signer: str | None) -> None:
    key, certificate = folder / f"{name}-key.pem", folder / f"{name}-cert.pem"
    words = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256", "-days", "3"),
        *("-config", str(folder / "openssl.cnf"), "-extensions", section),
        *("-subj", f"/CN={'localhost' if section == 'server' else name}"),
        *("-keyout", str(key), "-out", str(certificate)),
    ]
    if signer is not None:
        authority = folder / f"{signer}-cert.pem", folder / f"{signer}-key.pem"
        words += ["-CA", str(authority[0]), "-CAkey", str(authority[1])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl cannot make {name}: {done.stderr}")


def make_certificates(folder: Path) -> Path:
    """Fill an empty or new folder; return it. Raises RuntimeError when openssl fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "openssl.cnf").write_text(_CONFIG)
    _make(folder, "ca", "ca", None)
    _make(folder, "server", "server", "ca")
    _make(folder, "client", "client", "ca")
    _make(folder, "other", "ca", None)
    _make(folder, "stranger", "client", "other")
    return folder


def client_context(folder: Path, who: str | None = "client") -> ssl.SSLContext:
    """Return a context that checks the server's certificate and shows that of `who`, if any."""
    context = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
    if who is not None:
        context.load_cert_chain(folder / f"{who}-cert.pem", folder / f"{who}-key.pem")
    return context


def context_of_version(folder: Path, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a context that speaks one version of TLS alone, however old."""
    context = client_context(folder)
    if version < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        # The older ones are deprecated, which is why a server is asked whether it takes them.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = min(version, ssl.TLSVersion.TLSv1_2)
        context.maximum_version = version
        context.minimum_version = version
    return context

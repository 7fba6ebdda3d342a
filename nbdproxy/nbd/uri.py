"""NBD URIs: where a server is, and which of its exports is meant.

The form is that of the specification (doc/uri.md) and of RFC 3986: `nbd://HOST[:PORT]/EXPORT` and
`nbd+unix:///EXPORT?socket=PATH`, with `nbds` for TLS. The export's name is the path without its
first slash, percent-decoded; its bytes need not be UTF-8 and come as surrogate escapes, like paths.
`parse(str(uri))` gives the same value again.

`peer-user`, of our own, names a user whose Unix socket is believed besides ours and root's.

Whatever is not understood is refused with a sentence: a parameter that is silently ignored may
have been the one that asked for safety. Without a host, TCP means localhost, as for libnbd.

Not covered: user names, TLS with anything but X.509, other transports (vsock, ssh).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import NoReturn
from urllib.parse import quote, unquote

from nbdproxy.errors import UsageError
from nbdproxy.nbd.constants import MAX_STRING, NBD_PORT

_LOCALHOST = "localhost"
_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
"""Whether there is TLS, and whether it is a Unix socket."""

_FAMILY = re.compile(r"nbds?(\+[a-z0-9.+-]*)?:", re.IGNORECASE)
_PARTS = re.compile(r"([^:]*):(//([^/?]*))?([^?]*)(\?(.*))?")
_FOREIGN = re.compile(r"[^A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%-]|%(?![0-9A-Fa-f]{2})")
"""What RFC 3986 does not allow; a fragment is told apart before."""
_HOST_PORT = re.compile(r"(\[([^\]]*)\]|[^:\[\]]*)(:([^:]*))?")
_PORT = re.compile(r"[0-9]{1,5}")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9._~-]+)?")
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]*")
_TLS_PARAMETERS = ("tls-certificates", "tls-hostname", "tls-type", "tls-verify-peer")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """An export of a server. `str()` of it is the URI.

    tls           whether TLS is required
    host, port    of a server on TCP; as they are by default for one on a Unix socket
    socket        path of a Unix socket, with a NUL in front for an abstract one; None for TCP
    certificates  folder with ca-cert.pem, and client-cert.pem, client-key.pem for both-sided TLS
    tls_hostname  the name to expect in the server's certificate, if not `host`
    verify_peer   whether the server's certificate is checked at all
    peer_user     whose Unix socket it may be, by name or number, besides ours and root's
    """

    export: str = ""
    tls: bool = False
    host: str = _LOCALHOST
    port: int = NBD_PORT
    socket: str | None = None
    certificates: str | None = None
    tls_hostname: str | None = None
    verify_peer: bool = True
    peer_user: str | None = None

    def __str__(self) -> str:
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")
        query = "&".join(f"{name}={_quote(value)}" for name, value in self._parameters().items())
        return f"{scheme}://{self._authority()}/{_quote(self.export)}{'?' if query else ''}{query}"

    def _authority(self) -> str:
        if self.socket is not None:
            return ""
        host = f"[{_quote(self.host, ':')}]" if ":" in self.host else self.host
        return host if self.port == NBD_PORT else f"{host}:{self.port}"

    def _parameters(self) -> dict[str, str]:
        told = {
            "socket": self.socket,
            "peer-user": self.peer_user,
            "tls-certificates": self.certificates,
            "tls-hostname": self.tls_hostname,
            "tls-verify-peer": None if self.verify_peer else "0",
        }
        return {name: value for name, value in told.items() if value is not None}


def is_uri(text: str) -> bool:
    """Tell an NBD URI, understood or not, from a path: `./nbd:disk` is a path."""
    return _FAMILY.match(text) is not None


def parse(text: str) -> NbdUri:
    """Return what a URI names; raises UsageError with a sentence that says what is wrong."""
    address, hash_sign, _ = text.partition("#")
    if hash_sign:
        _refuse(text, "it has a fragment; write # as %23")
    if foreign := _FOREIGN.search(address):
        _refuse(text, f"{foreign[0]!r} cannot stand in a URI; write {_quote(foreign[0], '')}")
    parts = _PARTS.fullmatch(address)
    if parts is None or parts[1].lower() not in _SCHEMES:
        _refuse(text, f"it has to begin with {', '.join(name + ':' for name in _SCHEMES)}")
    tls, unix = _SCHEMES[parts[1].lower()]
    parameters = _query(text, parts[6] or "")
    socket = parameters.pop("socket", None)
    peer_user = parameters.pop("peer-user", None)
    if unix:
        if parts[3]:
            _refuse(text, "a Unix socket has no host; write nbd+unix:///EXPORT?socket=PATH")
        if socket is None:
            _refuse(text, "it has to name a Unix socket; add ?socket=PATH")
        host, port = _LOCALHOST, NBD_PORT
    else:
        if parts[3] is None:
            _refuse(text, "the host is missing; write nbd://HOST/EXPORT")
        if socket is not None:
            _refuse(text, "socket= is for Unix sockets; write nbd+unix: or nbds+unix:")
        if peer_user is not None:
            _refuse(text, "peer-user= is for Unix sockets; write nbd+unix: or nbds+unix:")
        host, port = _host_port(text, parts[3])
    export = _export(text, parts[4].removeprefix("/"))
    uri = NbdUri(export, tls, host, port, socket, peer_user=peer_user)
    return _with_tls(text, uri, parameters)


def _refuse(text: str, why: str) -> NoReturn:
    raise UsageError(f"{text!r} is no NBD URI that can be used: {why}")


def _quote(text: str, safe: str = "/") -> str:
    return quote(text, safe=safe, errors="surrogateescape")


def _unquote(text: str) -> str:
    # Not unquote_plus: in a URI, outside of HTML forms, a plus is a plus.
    return unquote(text, errors="surrogateescape")


def _export(text: str, path: str) -> str:
    name = _unquote(path)
    if "\0" in name:
        _refuse(text, "no export has a NUL in its name")
    if len(name.encode(errors="surrogateescape")) > MAX_STRING:
        _refuse(text, f"no export has a name of more than {MAX_STRING} bytes")
    return name


def _host_port(text: str, authority: str) -> tuple[str, int]:
    if "@" in authority:
        _refuse(text, "it has a user name, which is not supported")
    parts = _HOST_PORT.fullmatch(authority)
    if parts is None:
        _refuse(text, "an IPv6 address is written in brackets, nbd://[::1]/EXPORT")
    host, literal, port = parts[1], parts[2], parts[4]
    if literal is not None:
        host = _unquote(literal)
        if not _is_ipv6(host):
            _refuse(text, f"{host!r} is no IPv6 address")
    elif _HOST_NAME.fullmatch(host) is None:
        _refuse(text, f"{host!r} is no host")
    if not port:
        return host or _LOCALHOST, NBD_PORT
    if _PORT.fullmatch(port) is None or not 0 < int(port) < 65536:
        _refuse(text, f"{port!r} is no port")
    return host or _LOCALHOST, int(port)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return _IPV6.fullmatch(host) is not None


def _query(text: str, query: str) -> dict[str, str]:
    """Return the parameters by name; all are known, none is there twice."""
    found: dict[str, str] = {}
    for part in query.split("&") if query else []:
        name, _, value = map(_unquote, part.partition("="))
        if name not in ("socket", "peer-user", *_TLS_PARAMETERS):
            _refuse(text, f"the parameter {name!r} is not known")
        if name in found:
            _refuse(text, f"{name} is there twice")
        # A Unix socket in the abstract namespace has a NUL in front.
        if "\0" in value[1 if name == "socket" else 0 :] or not value:
            _refuse(text, f"{name} needs a value without a NUL")
        found[name] = value
    return found


def _with_tls(text: str, uri: NbdUri, parameters: dict[str, str]) -> NbdUri:
    if parameters and not uri.tls:
        _refuse(text, f"{next(iter(parameters))} is for TLS; write nbds: or nbds+unix:")
    if parameters.get("tls-type", "x509") != "x509":
        _refuse(text, "only TLS with certificates is supported; leave out tls-type")
    verify = parameters.get("tls-verify-peer", "1")
    if verify not in ("0", "1"):
        _refuse(text, "tls-verify-peer is 0 or 1")
    return replace(
        uri,
        certificates=parameters.get("tls-certificates"),
        tls_hostname=parameters.get("tls-hostname"),
        verify_peer=verify == "1",
    )

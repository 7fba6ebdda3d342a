"""The target disk through the guest kernel's own NBD client, where QEMU's is left out.

The guest has a network card, and `nbd-client` from the tools disk connects the kernel's nbd driver
to a server on the host. The kernel has one queue for each connection, and a CPU keeps to one queue:
to use all connections, give the guest as many CPUs. What this needs is loaded only in guests that
want it.

Covers plain TCP to the host's 127.0.0.1, which QEMU's user network shows to the guest as 10.0.2.2,
and needs no privileges on the host. Does not cover TLS, Unix sockets and servers elsewhere.
"""

from __future__ import annotations

import shlex

from nbdproxy.errors import LabError
from nbdproxy.nbd.uri import is_uri, parse

NETWORK = ("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,addr=5,romfile=")
"""QEMU's options for the card; nobody boots from it, and its ROM is a package of its own."""

DISK = "/dev/nbd0"

_CLIENT = "/tools/bin/nbd-client"
_GUEST = "10.0.2.15"
_HOST = "10.0.2.2"
_LOOPBACK = ("127.0.0.1", "localhost")

DETACH = (f"{_CLIENT} -d {DISK} || fail nbd-client",)
"""The lines of shell that end the connections in order."""


def attach(uri: str, connections: int) -> tuple[str, ...]:
    """Return the lines of shell that connect `DISK` to a server; `LabError` if none can.

    A connection's replies are read by a work item that lasts as long as it does. When the kernel
    takes more than 10 ms to make the threads for them, the queue's rescuer thread takes several
    such items, and never comes to the second: what is sent on that connection stands still until
    it times out. So the threads are counted, and another try finds them made.
    """
    port, export = _server(uri)
    return (
        "load nbd",
        f"ifconfig eth0 {_GUEST} netmask 255.255.255.0 up || fail network",
        "receivers() { grep -lsF +nbd0-recv /proc/[0-9]*/comm | wc -l; }",
        "for try in $(seq 10); do",
        f"  {_CLIENT} -N {shlex.quote(export)} -C {connections} {_HOST} {port} {DISK}"
        " || fail nbd-client",
        f"  for n in 1 2 3 4 5; do [ $(receivers) = {connections} ] && break 2; sleep 0.2; done",
        f"  {_CLIENT} -d {DISK}",
        "done",
        f"[ $(receivers) = {connections} ] || fail receivers",
        f"blockdev --rereadpt {DISK}",  # the kernel does not look for partitions by itself
    )


def _server(text: str) -> tuple[int, str]:
    """Return the port and the export that an NBD URI names."""
    uri = parse(text) if is_uri(text) else None
    if uri is None or uri.tls or uri.socket is not None or uri.host not in _LOOPBACK:
        raise LabError(
            f"the guest's kernel reaches only nbd://127.0.0.1:PORT/EXPORT, not {text}; "
            "serve with --listen 127.0.0.1:0"
        )
    return uri.port, uri.export

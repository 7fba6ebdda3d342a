"""`ThreadedServer`: exports served by a thread, for plain code that goes on meanwhile."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Self

import trio

from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.server.front.endpoints import Endpoint, listen_unix
from nbdproxy.server.front.export_provider import ExportProvider
from nbdproxy.server.front.listener import Listener
from nbdproxy.server.shared.power import Power
from nbdproxy.server.shared.tls import ServerTls

_GRACE_S = 1.0


async def host(exports: ExportProvider, endpoint: Endpoint, ended: trio.Event) -> None:
    """Let clients in until `ended` is set; then they have a second to have their answers."""
    listener = Listener(exports, endpoint, ServerTls(), Power())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run)
        await ended.wait()
        listener.shut()
        listener.wind_up(_GRACE_S)


class ThreadedServer:
    """Exports on a socket of their own; a context manager."""

    def __init__(self, exports: ExportProvider) -> None:
        self._exports = exports
        self._folder = tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
        self.socket = Path(self._folder.name) / "socket"
        self._endpoint = listen_unix(self.socket)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ended = trio.Event()
        self._ready.set()
        await host(self._exports, self._endpoint, self._ended)

    def uri(self, name: str) -> str:
        """Return the NBD URI of an export."""
        return self._endpoint.uri(name)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._ended.set)
        self._thread.join()
        self._endpoint.close()
        self._folder.cleanup()

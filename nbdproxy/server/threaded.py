"""`ServedInThread`: exports served by a thread, for plain code that goes on meanwhile."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Self

import trio

from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.endpoints import listen_unix
from nbdproxy.server.service import (
    OpenExport,
    Service,
    ServingEnd,
    Setting,
    first_of,
)
from nbdproxy.server.shared.power import Power


class ServedInThread:
    """Exports on a Unix socket, by default one in a folder of its own; a context manager.

    At the end clients have a second to have their answers, and the disks are made durable. Raises
    what opening an export raises, on entry, and on leaving the failure of one while it was served.

    >>> with nbdproxy.serve("disk.img", overlay=True) as served:
    ...     served.uri.startswith("nbd+unix:///?socket=")
    True
    """

    def __init__(self, openers: Sequence[OpenExport], socket: Path | None = None) -> None:
        self._openers = openers
        self._folder = None
        if socket is None:
            self._folder = tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
            socket = Path(self._folder.name) / "socket"
        self.socket = socket
        self._is_ready = threading.Event()
        self._power = Power()
        self._exports: list[Export] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nbdproxy serves", daemon=True)

    @property
    def uri(self) -> str:
        """The NBD URI of the first export."""
        return self._setting.uri(self._exports[0])

    @property
    def is_off(self) -> bool:
        """Whether the power was cut: nothing is answered any more."""
        return self._power.off

    def cut(self, reason: str = "cut by the program") -> None:
        """Cut the power: what no flush has covered is lost as the policies say."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._power.cut, reason)

    def __enter__(self) -> Self:
        try:
            self._setting = Setting(listen_unix(self.socket))
        except BaseException:
            self._clean_up()
            raise
        self._thread.start()
        self._is_ready.wait()
        if self._failure is not None:
            self._end()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(trio.RunFinishedError):  # after a cut of the power
            self._token.run_sync_soon(self._ending.begin, "ended by the program")
        self._end()

    def _end(self) -> None:
        self._thread.join()
        self._setting.endpoint.close()
        self._clean_up()
        if self._failure is not None:
            raise self._failure

    def _clean_up(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseExceptionGroup as group:
            self._failure = first_of(group)
        except BaseException as error:
            self._failure = error
        finally:
            self._is_ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ending = ServingEnd()
        async with AsyncExitStack() as stack:
            for opener in self._openers:
                self._exports.append(await stack.enter_async_context(opener(self._power)))
            service = Service(
                self._exports,
                self._setting,
                self._power,
                self._ending,
                lambda _: self._is_ready.set(),
            )
            outcome = await service.main()
            for export in self._exports:
                export.ended = outcome.reason
        for export in self._exports:
            if export.failure is not None:
                raise export.failure

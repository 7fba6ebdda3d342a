"""Runs exports: listens, lets clients in, ends in order or by a cut.

`serve` is the door to this room for plain code: it starts the event loop and returns when the
serving is over.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from nbdproxy.errors import NbdproxyError
from nbdproxy.nbd.constants import TlsMode
from nbdproxy.policy.model import CutEvent
from nbdproxy.recording.notes import NoteKind
from nbdproxy.server.door import Door
from nbdproxy.server.endpoints import Endpoint
from nbdproxy.server.export import Export
from nbdproxy.server.power import Power
from nbdproxy.server.qmp import QmpListener
from nbdproxy.server.tls import ServerTls

log = structlog.get_logger()

_GRACE_S = 5.0
"""Seconds that sessions have at the end to answer what is in flight; then they are cut off."""

OpenExport = Callable[[Power], AbstractAsyncContextManager[Export]]
"""Makes an export that hangs on a power supply, and ends it in order."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the serving ended: in which words, and with what exit code of the --run command."""

    reason: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """How exports are served.

    command  a shell command to serve for, with `$uri`, `$socket` and `$export` set
    qmp      QEMU's monitor socket, which may appear later
    """

    endpoint: Endpoint
    tls: ServerTls = ServerTls()  # noqa: RUF009 - frozen
    command: str | None = None
    qmp: Path | None = None

    def uri(self, export: Export) -> str:
        """Return what clients call an export."""
        return self.endpoint.uri(export.info.name, tls=self.tls.mode is TlsMode.REQUIRE)


def serve(
    openers: Sequence[OpenExport],
    setting: Setting,
    *,
    on_ready: Callable[[Sequence[Export]], None] = lambda _: None,
) -> Outcome:
    """Serve until a signal, the end of the command, a cut, or a failure of an export.

    Raises the export's failure in the last case, ImageError and the like if an export cannot be
    opened. The caller closes the endpoint.
    """
    try:
        return trio.run(_serve, openers, setting, on_ready)
    except BaseExceptionGroup as group:
        raise _first_of(group) from None


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what went wrong first; an error of ours is what the user can do something about."""
    ours = group.subgroup(NbdproxyError)
    found: BaseException = ours if ours is not None else group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


async def _serve(
    openers: Sequence[OpenExport],
    setting: Setting,
    on_ready: Callable[[Sequence[Export]], None],
) -> Outcome:
    power = Power()
    async with AsyncExitStack() as stack:
        exports = [await stack.enter_async_context(opener(power)) for opener in openers]
        service = Service(exports, setting, power, on_ready)
        outcome = await service.main()
        for export in exports:
            export.ended = outcome.reason
    for export in exports:
        if export.failure is not None:
            raise export.failure
    return outcome


class Service:
    """Exports behind one endpoint, for one run of the event loop."""

    def __init__(
        self,
        exports: Sequence[Export],
        setting: Setting,
        power: Power,
        on_ready: Callable[[Sequence[Export]], None],
    ) -> None:
        self._exports = exports
        self._setting = setting
        self._power = power
        self._on_ready = on_ready
        self._door = Door(exports, setting.endpoint, setting.tls, power)
        self._ending = trio.Event()
        self._reason = ""
        self._exit_code = 0
        self._qmp = QmpListener(setting.qmp, self._on_qmp) if setting.qmp is not None else None

    async def main(self) -> Outcome:
        """Serve, and end; a second signal ends at once until the very last client has left."""
        async with trio.open_nursery() as signals:
            await signals.start(self._watch_signals)
            await self._serve()
            signals.cancel_scope.cancel()
        return Outcome(self._power.reason or self._reason, self._exit_code)

    async def _serve(self) -> None:
        async with trio.open_nursery() as everything, trio.open_nursery() as service:
            service.start_soon(self._watch_power)
            for export in self._exports:
                service.start_soon(self._when_failed, export)
            if self._qmp is not None:
                for export in self._exports:
                    export.before_flush = self._qmp.poll
                service.start_soon(self._qmp.run)
            everything.start_soon(self._door.run)
            if self._setting.command is not None:
                service.start_soon(self._run_command, self._setting.command)
            self._on_ready(self._exports)
            await self._ending.wait()
            await self._stop()
            service.cancel_scope.cancel()

    async def _stop(self) -> None:
        """Let no one in any more; let the sessions end in order, or cut them off."""
        self._door.shut()
        if any(export.cuts_at(CutEvent.EXIT) for export in self._exports):
            self._power.cut(self._reason)
        if self._power.off:
            await self._cut()
            self._door.throw_out()
        else:
            self._door.wind_up(_GRACE_S)

    async def _cut(self) -> None:
        for export in self._exports:
            await export.cut()

    def _end(self, reason: str) -> None:
        if not self._ending.is_set():
            self._reason = reason
            self._ending.set()

    async def _watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if self._ending.is_set():
                    os._exit(128 + number)
                self._end(f"ended by {signal.Signals(number).name}")

    async def _watch_power(self) -> None:
        await self._power.wait_off()
        if self._ending.is_set():
            return
        # With a command, the machine stays dark until the command has ended.
        await self._cut()
        self._door.shut()
        self._door.throw_out()
        log.info("the power is cut", reason=self._power.reason)
        if self._setting.command is None:
            self._end(self._power.reason)

    async def _when_failed(self, export: Export) -> None:
        await export.failed.wait()
        self._end(f"failed: {export.failure}")

    def _on_qmp(self, event: str, text: str) -> None:
        if self._power.off:
            return
        for export in self._exports:
            export.note(NoteKind.QMP, text)
        cuts = any(export.cuts_at(CutEvent.SHUTDOWN) for export in self._exports)
        if event == "SHUTDOWN" and cuts:
            self._power.cut("QEMU reported SHUTDOWN")

    async def _run_command(self, command: str) -> None:
        path = self._setting.endpoint.path
        first = self._exports[0]
        environment = {
            **os.environ,
            "uri": self._setting.uri(first),
            "socket": "" if path is None else str(path),
            "export": first.info.name,
        }
        process = await trio.lowlevel.open_process(["/bin/sh", "-c", command], env=environment)
        try:
            code = await process.wait()
        except trio.Cancelled:
            process.terminate()
            with trio.move_on_after(_GRACE_S, shield=True):
                self._exit_code = _shell_code(await process.wait())
            raise
        self._exit_code = _shell_code(code)
        self._end("the command ended")


def _shell_code(code: int) -> int:
    """Return how a shell calls the exit code of a process; a signal's number is negative."""
    return code if code >= 0 else 128 - code

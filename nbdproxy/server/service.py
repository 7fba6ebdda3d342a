"""Runs exports: listens, lets clients in, ends in order or by a cut.

`serve` is what ordinary code calls: it starts the event loop and returns when the serving is over.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import trio

from nbdproxy.errors import NbdproxyError
from nbdproxy.nbd.constants import TlsMode
from nbdproxy.peers import TrustedPeers
from nbdproxy.server.below.qmp import QmpListener
from nbdproxy.server.children import Children
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.control import ControlSocket
from nbdproxy.server.front.endpoints import Endpoint
from nbdproxy.server.front.export_provider import FixedExports
from nbdproxy.server.front.listener import Listener
from nbdproxy.server.shared.power import Power
from nbdproxy.server.shared.tls import ServerTls
from nbdproxy.signals import told_to_end

log = structlog.get_logger()

_GRACE_S = 5.0
"""Seconds that sessions have at the end to answer what is in flight; then they are cut off."""

_CHILDREN_S = 0.02
"""Seconds between two looks whether a command's children have ended."""

OpenExport = Callable[[Power], AbstractAsyncContextManager[Export]]
"""Makes an export on a power supply, and ends it in order."""


@dataclass(frozen=True, slots=True)
class ServingOutcome:
    """How the serving ended: in which words, and with what exit code of the --run command."""

    reason: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """How exports are served.

    command  a shell command to serve for, with `$uri`, `$socket` and `$export` set
    qmp      QEMU's monitor socket, which may appear later
    believed whose monitor it may be
    control  where commands are taken, if they are
    """

    endpoint: Endpoint
    tls: ServerTls = ServerTls()  # noqa: RUF009 - frozen
    command: str | None = None
    qmp: Path | None = None
    believed: TrustedPeers = TrustedPeers()  # noqa: RUF009 - frozen
    control: Endpoint | None = None

    def uri(self, export: Export) -> str:
        """Return what clients call an export."""
        return self.endpoint.uri(export.info.name, tls=self.tls.mode is TlsMode.REQUIRE)


def serve(
    openers: Sequence[OpenExport],
    setting: Setting,
    *,
    on_ready: Callable[[Sequence[Export]], None] = lambda _: None,
) -> ServingOutcome:
    """Serve until a signal, the end of the command, a cut, or a failure of an export.

    Raises the export's failure in the last case, ImageError and the like if an export cannot be
    opened. The caller closes the endpoint.
    """
    try:
        return trio.run(_serve, openers, setting, on_ready)
    except BaseExceptionGroup as group:
        raise first_of(group) from None


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
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
) -> ServingOutcome:
    power, ending = Power(), ServingEnd()
    exports: list[Export] = []
    async with trio.open_nursery() as signals:
        await signals.start(ending.watch_signals)
        outcome = None
        with ending.opening:
            async with AsyncExitStack() as stack:
                for opener in openers:
                    exports.append(await stack.enter_async_context(opener(power)))
                ending.opened = True
                outcome = await Service(exports, setting, power, ending, on_ready).main()
                for export in exports:
                    export.ended = outcome.reason
        signals.cancel_scope.cancel()
    for export in exports:
        if export.failure is not None:
            raise export.failure
    return outcome or ServingOutcome(ending.reason, ending.exit_code)


def _nothing() -> None:
    """Do nothing."""


class ServingEnd:
    """Why and when the serving ends; the first reason counts.

    `opening` is cancelled by a signal that comes before all exports are open; `at_once` is called
    when a second one ends the process.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.exit_code = 0
        self.opened = False
        self.opening = trio.CancelScope()
        self.at_once: Callable[[], object] = _nothing
        self._begun = trio.Event()

    def begin(self, reason: str) -> None:
        """End for this reason."""
        if not self._begun.is_set():
            self.reason = reason
            self._begun.set()

    @property
    def begun(self) -> bool:
        """Whether there is a reason."""
        return self._begun.is_set()

    async def wait_begun(self) -> None:
        """Return when there is a reason to end."""
        await self._begun.wait()

    async def watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        """End in order at the first signal, and at once at a second one."""
        with trio.open_signal_receiver(signal.SIGINT, *told_to_end()) as signals:
            task_status.started()
            signalled = False
            async for number in signals:
                if signalled:
                    self.at_once()
                    os._exit(128 + number)
                signalled = True
                self.begin(f"ended by {signal.Signals(number).name}")
                if not self.opened:
                    self.exit_code = 128 + number
                    self.opening.cancel()


class Service:
    """Exports behind one endpoint, for one run of the event loop."""

    def __init__(
        self,
        exports: Sequence[Export],
        setting: Setting,
        power: Power,
        ending: ServingEnd,
        on_ready: Callable[[Sequence[Export]], None],
    ) -> None:
        self._exports = exports
        self._setting = setting
        self._power = power
        self._on_ready = on_ready
        self._listener = Listener(FixedExports(exports), setting.endpoint, setting.tls, power)
        self._ending = ending
        self._exit_code = 0
        self._qmp = None
        if setting.qmp is not None:
            self._qmp = QmpListener(setting.qmp, self._on_qmp, setting.believed)

    async def main(self) -> ServingOutcome:
        """Serve, and end."""
        async with trio.open_nursery() as everything, trio.open_nursery() as service:
            service.start_soon(self._watch_power)
            for export in self._exports:
                service.start_soon(self._when_failed, export)
            if self._qmp is not None:
                for export in self._exports:
                    export.watch_before_flush(self._qmp.poll)
                service.start_soon(self._qmp.run)
            if self._setting.control is not None:
                control = ControlSocket(self._setting.control, self._exports, self._power)
                service.start_soon(control.run)
            everything.start_soon(self._listener.run)
            if self._setting.command is not None:
                service.start_soon(self._run_command, self._setting.command)
            self._on_ready(self._exports)
            await self._ending.wait_begun()
            await self._stop()
            service.cancel_scope.cancel()
        if self._power.off:  # a client that left at the end may have been what cut it
            await self._cut()
        return ServingOutcome(self._power.reason or self._ending.reason, self._exit_code)

    async def _stop(self) -> None:
        """Let no one in any more; let the sessions end in order, or cut them off."""
        self._listener.shut()
        for export in self._exports:
            export.ending.set()
            export.resume()
            export.exits(self._ending.reason)
        if self._power.off:
            await self._cut()
            self._listener.throw_out()
        else:
            self._listener.wind_up(_GRACE_S)

    async def _cut(self) -> None:
        for export in self._exports:
            await export.cut()

    async def _watch_power(self) -> None:
        await self._power.wait_off()
        if self._ending.begun:
            return
        for export in self._exports:
            export.ending.set()
        # With a command, the machine stays dark until the command has ended.
        await self._cut()
        self._listener.shut()
        self._listener.throw_out()
        log.info("the power is cut", reason=self._power.reason)
        if self._setting.command is None:
            self._ending.begin(self._power.reason)

    async def _when_failed(self, export: Export) -> None:
        await export.request_log.failed.wait()
        self._ending.begin(f"failed: {export.failure}")

    def _on_qmp(self, event: str, text: str) -> None:
        if self._power.off:
            return
        for export in self._exports:
            export.qmp(event, text)

    async def _run_command(self, command: str) -> None:
        path = self._setting.endpoint.path
        first = self._exports[0]
        children = Children()
        environment = {
            **os.environ,
            "uri": self._setting.uri(first),
            "socket": "" if path is None else str(path),
            "export": first.info.name,
            **children.environment,
        }
        process = await trio.lowlevel.open_process(["/bin/sh", "-c", command], env=environment)
        self._ending.at_once = partial(children.signal, signal.SIGKILL)
        try:
            code = await process.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                self._exit_code = _shell_code(await _end(process, children))
            raise
        finally:
            self._ending.at_once = _nothing
        self._exit_code = _shell_code(code)
        self._ending.begin("the command ended")


async def _end(process: trio.Process, children: Children) -> int:
    """End a command and all that it started; return its exit code."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        with trio.move_on_after(_GRACE_S):
            children.signal(number)
            await process.wait()
            while children.signal(0 if number == signal.SIGTERM else number):
                await trio.sleep(_CHILDREN_S)
            break
    return -number if process.returncode is None else process.returncode


def _shell_code(code: int) -> int:
    """Return how a shell calls the exit code of a process; a signal's number is negative."""
    return code if code >= 0 else 128 - code

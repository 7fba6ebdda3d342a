"""The control socket: JSON lines in, JSON lines out, each answer after its effect.

    {"do": "status"}                    how the exports are
    {"do": "cut"}                       cut the power, of all exports at once
    {"do": "mark", "name": "NAME"}      mark the instant in the recordings
    {"do": "pause"}                     let nothing new begin, finish what was begun, flush
    {"do": "resume"}                    go on
    {"do": "policy", "names": [...], "settings": ["KEY=VALUE"], "seed": 0}
                                        let other policies come into force
    {"do": "lift"}                      let reads show what the disk holds

With `"export": NAME` a command but `cut` is for one export only. An answer is {"ok": true, ...} or
{"ok": false, "error": "a sentence"}. Commands of one connection are done one after the other.

Who may connect is trusted with all of this (the socket is its owner's alone), and still cannot end
the serving by what it sends. At most `CLIENTS` are connected: for one more the connection goes
that has been idle the longest.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
import trio

from nbdproxy.errors import NbdproxyError, UsageError
from nbdproxy.lines import LONGEST, parse_object
from nbdproxy.policy.compose import load_all
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.endpoints import Endpoint
from nbdproxy.server.shared.power import Power

log = structlog.get_logger()

CLIENTS = 16
"""Connections at once."""

_LOAD_S = 10
"""Seconds that policies have to be read."""

_SEND_S = 5
"""Seconds that a client has to take an answer."""

ControlReply = dict[str, Any]


class ControlSocket:
    """Takes commands for `exports` at `endpoint`, which the caller closes."""

    def __init__(self, endpoint: Endpoint, exports: Sequence[Export], power: Power) -> None:
        self._endpoint = endpoint
        self._exports = {export.info.name: export for export in exports}
        self._power = power
        # Of those connected: how to drop them. The longest idle is the first.
        self._idle: dict[trio.CancelScope, None] = {}
        self._connected = 0
        self._commands: dict[str, Callable[[Mapping[str, Any]], Awaitable[ControlReply]]] = {
            "status": self._status,
            "cut": self._cut,
            "mark": self._mark,
            "pause": self._pause,
            "resume": self._resume,
            "policy": self._policy,
            "lift": self._lift,
        }

    async def run(self) -> None:
        """Take commands until cancelled."""
        async with trio.open_nursery() as clients:
            while True:
                await trio.lowlevel.wait_readable(self._endpoint.sock)
                try:
                    sock, _ = self._endpoint.sock.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    log.debug("no client at the control socket", reason=error.strerror)
                    self._make_room()
                    await trio.sleep(0.05)
                    continue
                if self._connected >= CLIENTS and not self._make_room():
                    sock.close()  # all are at work
                    continue
                self._connected += 1
                clients.start_soon(self._serve, sock)

    def _make_room(self) -> bool:
        """Drop the connection that has been idle the longest, if there is one."""
        for scope in self._idle:
            scope.cancel()
            del self._idle[scope]
            return True
        return False

    async def _serve(self, sock: socket.socket) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        try:
            with trio.CancelScope() as scope:
                async with stream:
                    self._idle[scope] = None
                    await self._take_commands(stream, scope)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a client of the control socket is gone")
        finally:
            self._idle.pop(scope, None)
            self._connected -= 1

    async def _take_commands(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        pending = b""
        while data := await stream.receive_some(65536):
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > LONGEST:
                lines.append(pending)
            if not lines:
                continue
            self._idle.pop(scope, None)
            for line in lines:
                if not await self._answer(stream, line):
                    return
            self._idle[scope] = None

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> bool:
        """Do what a line says, and answer; tell whether there may be another one."""
        try:
            answer = await self._do(line)
        except NbdproxyError as error:
            answer = {"ok": False, "error": str(error)}
        # A cut ends the serving; whoever asked for it still has its answer.
        with trio.move_on_after(_SEND_S, shield=True) as sending:
            await stream.send_all(json.dumps(answer).encode() + b"\n")
        return len(line) <= LONGEST and not sending.cancelled_caught

    async def _do(self, line: bytes) -> ControlReply:
        asked = parse_object(line)
        what = asked.get("do") if asked is not None else None
        if asked is None or not isinstance(what, str) or what not in self._commands:
            known = ", ".join(self._commands)
            raise UsageError(f'not a command: send {{"do": NAME}} with one of {known}')
        return {"ok": True, **await self._commands[what](asked)}

    def _meant(self, asked: Mapping[str, Any]) -> list[Export]:
        """Return the exports that a command is for."""
        name = asked.get("export")
        if name is None:
            return list(self._exports.values())
        if not isinstance(name, str) or name not in self._exports:
            known = ", ".join(repr(one) for one in self._exports)
            raise UsageError(f"there is no export {name!r}; there are {known}")
        return [self._exports[name]]

    def _need_power(self) -> None:
        if self._power.off:
            raise UsageError(f"the power is off ({self._power.reason}): start nbdproxy again")

    async def _status(self, asked: Mapping[str, Any]) -> ControlReply:
        return {
            "power": "off" if self._power.off else "on",
            "exports": [_describe(export) for export in self._meant(asked)],
        }

    async def _cut(self, asked: Mapping[str, Any]) -> ControlReply:  # noqa: ARG002 - as all commands
        self._need_power()
        self._power.cut("nbdproxy ctl cut")
        with trio.CancelScope(shield=True):
            for export in self._exports.values():
                await export.cut()
        return {"held_bytes": sum(export.held_at_cut for export in self._exports.values())}

    async def _mark(self, asked: Mapping[str, Any]) -> ControlReply:
        name = asked.get("name")
        if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable():
            raise UsageError("a mark has a name of 1 to 200 printable letters")
        self._need_power()
        exports = self._meant(asked)
        for export in exports:
            export.mark(name)
        return {
            "seq": {
                export.info.name: export.recorder.seq - 1
                for export in exports
                if export.recorder is not None
            }
        }

    async def _pause(self, asked: Mapping[str, Any]) -> ControlReply:
        self._need_power()
        for export in self._meant(asked):
            await export.pause()
        return {}

    async def _resume(self, asked: Mapping[str, Any]) -> ControlReply:
        for export in self._meant(asked):
            export.resume()
        return {}

    async def _policy(self, asked: Mapping[str, Any]) -> ControlReply:
        names, settings = asked.get("names"), asked.get("settings", [])
        seed = asked.get("seed")
        if not _are_texts(names) or not names or not _are_texts(settings):
            raise UsageError('policy needs "names", a list of names or paths')
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise UsageError('"seed" must be a whole number')
        self._need_power()
        # In a thread: what is named may be anything that can be opened, a FIFO for one.
        load = partial(load_all, names, settings)
        try:
            with trio.fail_after(_LOAD_S):
                policy = await trio.to_thread.run_sync(load, abandon_on_cancel=True)
        except trio.TooSlowError:
            raise UsageError(f"{names[0]} cannot be read within {_LOAD_S} s") from None
        for export in self._meant(asked):
            await export.change_policy(policy, export.active.seed if seed is None else seed)
        return {"policy": policy.name}

    async def _lift(self, asked: Mapping[str, Any]) -> ControlReply:
        self._need_power()
        exports = self._meant(asked)
        shown = sum(export.active.store.shown_bytes for export in exports)
        for export in exports:
            export.lift()
        return {"lifted_bytes": shown}


def _are_texts(value: object) -> bool:
    """Tell whether something is a list of texts that can be names of files."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return False
    try:
        return b"\0" not in os.fsencode("".join(value))
    except UnicodeEncodeError:
        return False


def _describe(export: Export) -> ControlReply:
    counted, recorder, active = export.counters, export.recorder, export.active
    return {
        "name": export.info.name,
        "description": export.info.description,
        "size": export.info.size,
        "policies": list(export.policy.names),
        "seed": active.seed,
        "paused": export.paused,
        "failure": None if export.failure is None else str(export.failure),
        "reads": counted.reads,
        "writes": counted.writes,
        "written_bytes": counted.written,
        "flushes": counted.flushes,
        "held_bytes": export.held_at_cut if export.power.off else active.store.held_bytes,
        "shown_bytes": active.store.shown_bytes,
        "rules": active.matched,
        "recording": None if recorder is None else str(recorder.path),
        "events": None if recorder is None else recorder.seq,
    }

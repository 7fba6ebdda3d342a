"""What a check gets: servers of one kind, started once per setup, and connections to them.

A `Bench` lives as long as the servers; a check's connections, and the servers that it wanted for
itself, end with the check. A server that died under a check is noticed then, and the next check
gets a new one.

Not covered: what counts as right; see `check`.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.blackbox.certificates import client_context
from tests.blackbox.haggle import (
    ALLOCATION,
    EXTENDED_HEADERS,
    FIXED_NEWSTYLE,
    NO_ZEROES,
    SET_META,
    STRUCTURED_REPLY,
    Haggle,
)
from tests.blackbox.running import Running, StartError, pattern
from tests.blackbox.servers import PLAIN, Kind, Setup
from tests.blackbox.transmit import Style, Transmission, enter
from tests.blackbox.wire import (
    AbsentError,
    Clock,
    ClosedError,
    SilentError,
    ViolationError,
    Wire,
)

QUICK_S = 3.0
"""Seconds in which a well-behaved client is served while others misbehave."""
AGONY_S = 3.0
"""Seconds that a server which no longer listens may take to end."""


class CrashError(AssertionError):
    """A server died under a check."""


class Bench:
    """The servers of one kind, and a check's connections to them."""

    def __init__(self, kind: Kind, folder: Path, certificates: Path) -> None:
        self.kind, self.certificates = kind, certificates
        self._folder, self._count = folder, 0
        self._shared: dict[Setup, Running] = {}
        self._failed: dict[Setup, str] = {}
        self._own: list[Running] = []
        self._wires: list[Wire] = []
        self._before, self._current = "nothing", "nothing"
        self.clock = Clock(0)

    def begin(self, name: str, seconds: float) -> None:
        """Begin a check that may take that long, starts of servers not counted."""
        self._before, self._current = self._current, name
        self.clock = Clock(seconds)

    def settle(self, patience_s: float) -> None:
        """End a check; raises CrashError when a server died under it or within that time."""
        for wire in self._wires:
            wire.close()
        self._wires.clear()
        time.sleep(patience_s)
        crashed = []
        for running in [*self._shared.values(), *self._own]:
            if not running.alive() and not running.stopped:
                told = running.last_words
                crashed.append(f"{running.ending()}{': ' if told else ''}{told}")
        self._shared = {s: r for s, r in self._shared.items() if r.alive() and not r.stopped}
        for running in self._own:
            running.kill()
        self._own.clear()
        if crashed:
            raise CrashError("the server died: " + "; ".join(crashed))

    def close(self) -> None:
        """End all servers."""
        for running in [*self._shared.values(), *self._own]:
            running.kill()
        self._shared.clear()

    def new_path(self) -> Path:
        """Return a path that nothing uses yet, for a folder or a socket."""
        self._count += 1
        return self._folder / f"{self.kind.name}-{self._count}"

    def launch(self, setup: Setup = PLAIN) -> Running:
        """Start a server for this check alone, without waiting until it is ready."""
        running = Running(self.kind, setup, self.new_path(), self.certificates)
        self._own.append(running)
        return running

    def fresh(self, setup: Setup = PLAIN) -> Running:
        """Start a server for this check alone."""
        begun = time.monotonic()
        running = self.launch(setup)
        running.started()
        self.clock.extend(time.monotonic() - begun)
        return running

    def server(self, setup: Setup = PLAIN) -> Running:
        """Return the server that all checks share for a setup."""
        if setup in self._failed:
            raise StartError(self._failed[setup])
        if setup not in self._shared:
            try:
                running = self.fresh(setup)
            except StartError as error:
                self._failed[setup] = str(error)
                raise
            self._own.remove(running)
            self._shared[setup] = running
        return self._shared[setup]

    def wire(self, on: Running | Setup = PLAIN) -> Wire:
        """Connect."""
        running = on if isinstance(on, Running) else self.server(on)
        try:
            wire = Wire(running.socket, self.clock)
        except ClosedError as error:
            if running in self._own or running.stopped:
                raise
            # It goes down, but has not gone yet when the check that did it settles.
            running.wait(AGONY_S)
            raise CrashError(f"it no longer listens; {self._before} came before") from error
        self._wires.append(wire)
        return wire

    def haggle(
        self, on: Running | Setup = PLAIN, *, flags: int = FIXED_NEWSTYLE | NO_ZEROES
    ) -> Haggle:
        """Connect, and exchange greeting and flags."""
        return Haggle(self.wire(on)).start(flags)

    def secure(self, on: Running | Setup, who: str | None = "client") -> Haggle:
        """Connect and start TLS, with the certificate of `who`, if any."""
        haggle = self.haggle(on)
        haggle.secure(client_context(self.certificates, who))
        return haggle

    def enter(
        self,
        on: Running | Setup = PLAIN,
        *,
        style: Style = Style.SIMPLE,
        status: bool = False,
        secure: bool = False,
    ) -> Transmission:
        """Go to transmission on the first export, with `base:allocation` if `status`."""
        haggle = self.secure(on) if secure else self.haggle(on)
        if style is Style.STRUCTURED:
            haggle.need(STRUCTURED_REPLY, "STRUCTURED_REPLY")
        if style is Style.EXTENDED:
            haggle.need(EXTENDED_HEADERS, "EXTENDED_HEADERS")
        name = (on.setup if isinstance(on, Running) else on).exports[0]
        if status:
            word, found = haggle.choose(SET_META, name, ALLOCATION)
            if word != "ACK" or list(found.values()) != [ALLOCATION]:
                raise AbsentError(f"SET_META_CONTEXT is answered with {word}, {found}")
        return enter(haggle, name)

    def survives(self, on: Running | Setup = PLAIN, *, secure: bool = False) -> str:
        """Return "survives"; a good client that is not served quickly is a ViolationError."""
        begun = time.monotonic()
        name = (on.setup if isinstance(on, Running) else on).exports[0]
        try:
            with self.clock.muted():
                client = self.enter(on, secure=secure)
                data = client.read(0, 4096)
                client.leave()
        except (ClosedError, SilentError) as error:
            raise ViolationError(f"afterwards, a good client is not served: {error}") from error
        if data != pattern(name)[:4096]:
            raise ViolationError("afterwards, a READ returns wrong data")
        if (took := time.monotonic() - begun) > QUICK_S:
            raise ViolationError(f"afterwards, a good client waits {took:.1f} s")
        return "survives"

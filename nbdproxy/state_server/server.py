"""Serves the crash states of a recording: every state is an export, by its id or the name of a cut.

An export is made when a client asks for it and ends with the client's connection: what the client
writes goes to a scratch overlay of its own, and nobody else sees it. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import trio

from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.disks.traced import TracedDisk
from nbdproxy.errors import NbdproxyError, UsageError
from nbdproxy.extents import ExtentSet
from nbdproxy.nbd.export_info import ExportInfo
from nbdproxy.persistence.model import Level
from nbdproxy.policy import loader
from nbdproxy.policy.model import Policy
from nbdproxy.recording.notes import NoteKind
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.export.offer import offer
from nbdproxy.server.front.endpoints import Endpoint
from nbdproxy.server.service import ServingEnd
from nbdproxy.state_server.background import ThreadedServer, host

_GRACE_S = 1.0
_NAME_MAX = 4000
"""Bytes of a name that can be listed, `mark:` left out (NBD specification: strings up to 4096)."""


def state_named(timeline: Timeline, name: str) -> StateId:
    """Return the state that an export's name stands for.

    The name is a state's id, or a cut: that is the disk with all that had been sent by then.
    Raises UsageError if it is neither, or of another recording.
    """
    try:
        state = parse_state_id(name)
    except UsageError:
        position = resolve(timeline.source, name).position
        return StateId(position, Level.RECEIVED, Choice.ALL)
    timeline.open(state)
    return state


def cut_names(timeline: Timeline) -> list[str]:
    """Return the cuts that are listed: there are countless states, and each can be asked for."""
    marks = [note.text for note in timeline.source.notes if note.kind is NoteKind.MARK]
    marks = [name for name in marks if len(name.encode(errors="replace")) < _NAME_MAX]
    return ["end", "before-exit", "riskiest", *(f"mark:{name}" for name in dict.fromkeys(marks))]


class _Infos(Mapping[str, ExportInfo]):
    """What each state's export is; those of the cuts are listed."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def __getitem__(self, name: str) -> ExportInfo:
        try:
            state = state_named(self._timeline, name)
        except NbdproxyError as error:
            raise KeyError(str(error)) from None
        size = self._timeline.source.size
        return offer(name, size, f"state {state}", None, read_only=False, shared=False)

    def __iter__(self) -> Iterator[str]:
        return iter(cut_names(self._timeline))

    def __len__(self) -> int:
        return len(cut_names(self._timeline))


class StateExports:
    """All states of a timeline, as an `ExportProvider`."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.infos: Mapping[str, ExportInfo] = _Infos(timeline)
        self._policy: Policy = loader.load("passthrough").policy
        self._reads: dict[str, list[TracedDisk]] = {}

    @property
    def noted(self) -> Iterable[Export]:
        """None: nothing is recorded here."""
        return ()

    def take(self, name: str) -> Export:
        """Return the export of a state, for one connection."""
        state = state_named(self.timeline, name)
        traced = TracedDisk(self.timeline.open(state))
        if name in self._reads:
            self._reads[name].append(traced)
        disk = OverlayDisk(traced)
        return Export(
            name, ImageStore(disk), self._policy, description=f"state {state}", shared=False
        )

    def put_back(self, export: Export) -> None:
        """End the export, and what was written to it."""
        export.close()

    def watch(self, name: str) -> None:
        """Remember what is read of an export from here on."""
        self._reads[name] = []

    def reads(self, name: str) -> ExtentSet:
        """Return what all connections read of an export since it is watched, and forget it."""
        found = ExtentSet()
        for disk in self._reads.pop(name):
            for extent in disk.reads:
                found.add(extent.offset, extent.end)
        return found


def serve_states(exports: StateExports, endpoint: Endpoint) -> str:
    """Serve until a signal; return why it ended. The caller closes the endpoint."""

    async def main() -> str:
        ending, ended = ServingEnd(), trio.Event()
        ending.opened = True
        async with trio.open_nursery() as nursery:
            await nursery.start(ending.watch_signals)
            nursery.start_soon(host, exports, endpoint, ended)
            await ending.wait_begun()
            ended.set()
            nursery.cancel_scope.deadline = trio.current_time() + _GRACE_S
        return ending.reason

    return trio.run(main)


class StateServer(ThreadedServer):
    """The states of a timeline on a socket of their own, served by a thread; a context manager."""

    def __init__(self, timeline: Timeline) -> None:
        self.exports = StateExports(timeline)
        super().__init__(self.exports)

"""`Note`: what a recording holds besides requests and replies.

A note is an event like any other and has a seq; it changes nothing on the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nbdproxy.recording.format import SlotKind


class NoteKind(Enum):
    """What a note tells."""

    CONNECT = "connect"
    """A connection entered transmission; `text` is the client as the listener saw it."""
    DISC = "disc"
    """The client said NBD_CMD_DISC."""
    EOF = "eof"
    """The socket closed without it."""
    REFUSED = "refused"
    """A client was turned away; `text` says why."""
    MARK = "mark"
    """Somebody marked the instant; `text` is the name."""
    QMP = "qmp"
    """An event of QEMU's monitor; `text` is its JSON."""
    CUT = "cut"
    """A policy or the user cut the run here."""
    LOSS = "loss"
    """The store lost what was completed and not durable."""
    END = "end"
    """How the run ended."""
    FAULT = "fault"
    """A rule of a policy struck; `text` is JSON: see `FaultNote`."""
    POLICY = "policy"
    """A policy is in force from here on; `text` is JSON: policies, settings, seed."""

    @property
    def slot_kind(self) -> SlotKind:
        """The kind of slot such a note is written as."""
        return _SLOT_KIND[self]


_SLOT_KIND = {
    NoteKind.CONNECT: SlotKind.CONNECT,
    NoteKind.DISC: SlotKind.DISC,
    NoteKind.EOF: SlotKind.EOF,
    NoteKind.REFUSED: SlotKind.TURNED_AWAY,
    NoteKind.MARK: SlotKind.MARK,
    NoteKind.QMP: SlotKind.QMP,
    NoteKind.CUT: SlotKind.CUT,
    NoteKind.LOSS: SlotKind.LOSS,
    NoteKind.END: SlotKind.END,
    NoteKind.FAULT: SlotKind.FAULT,
    NoteKind.POLICY: SlotKind.POLICY,
}
NOTE_OF_SLOT = {slot: note for note, slot in _SLOT_KIND.items()}


@dataclass(frozen=True, slots=True)
class Note:
    """One note.

    `seq` is its position in the recording, `time_ns` nanoseconds since the recording's start,
    `connection` counts from 1 and is 0 where no connection is concerned.
    """

    seq: int
    time_ns: int
    kind: NoteKind
    connection: int
    text: str

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object that the text is; empty if it is none."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

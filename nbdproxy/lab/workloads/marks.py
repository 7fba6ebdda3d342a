"""Marks in a recording for what the guest prints: what it promised, and when at the earliest.

The guest's lines `committed N` and `mark NAME` become the marks `committed-N` and NAME in the
recordings of a running `nbdproxy serve --control SOCKET`.

Guarantees: a mark is sent when its line has come out of the guest, so it stands in the recording
behind all that the guest had an answer for when it printed: a cut at `mark:committed-N` has to have
the transaction N. Marks stand in the order of the lines; each is answered before the next is sent.
The guest does not wait for any of it: its lines queue up in the pipe. Waits are limited to
`ANSWER_S`; the first mark that is refused, say because the power was cut, is the last one sent.

Does not cover the other direction: by the time of a mark the guest may have done much more. And a
line that the kernel's own messages break up is not recognized, unless the workload hushes them.
"""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

from nbdproxy.errors import LabError

ANSWER_S = 10.0
"""Seconds that the control socket has for an answer."""

_LINE = re.compile(r"(?:(committed) (\d+)|mark (\S{1,200}))\s*")


def mark_of(line: str) -> str | None:
    """Return the name of the mark that a line of the guest asks for, None if it does not."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    return found[3] or f"{found[1]}-{found[2]}"


class Marker:
    """Hands the guest's lines on as marks; a context manager, and callable with a line.

    marked   how many marks are in the recording
    trouble  why there are no more of them, None if nothing is wrong
    """

    def __init__(self, control: Path) -> None:
        """Connect to a control socket; `LabError` if nothing listens there."""
        self.marked = 0
        self.trouble: str | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.connect(str(control))
        except OSError as error:
            self._socket.close()
            raise LabError(
                f"{control} does not answer ({error.strerror or error}); "
                f"is nbdproxy serve --control {control} running?"
            ) from None
        self._answers = self._socket.makefile("rb")

    def __call__(self, line: str) -> None:
        """Mark the instant if the line asks for it; harmless after trouble."""
        name = mark_of(line)
        if name is None or self.trouble is not None:
            return
        try:
            self._socket.sendall(json.dumps({"do": "mark", "name": name}).encode() + b"\n")
            answer = json.loads(self._answers.readline() or '{"ok": false, "error": "it is gone"}')
        except (OSError, ValueError) as error:
            answer = {"ok": False, "error": str(error)}
        if answer["ok"]:
            self.marked += 1
        else:
            self.trouble = f"mark {name} is not in the recording: {answer['error']}"

    def close(self) -> None:
        """Close the connection; closing twice is harmless."""
        self._answers.close()
        self._socket.close()

    def __enter__(self) -> Marker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

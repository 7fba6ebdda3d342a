"""What every command shares: where text goes, how errors look, how logs look.

Results go to stdout; logs, hints and progress to stderr. A terminal shows what is being done, and
for how long it has been.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

import structlog
from rich.console import Console, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from nbdproxy import streams
from nbdproxy.printable import made_visible, visible


class _TimedStatus(Status):
    """What is being done now, as plain text, and beside it for how long: 0:01:15."""

    def __init__(self, what: RenderableType, **options: Any) -> None:
        self._began = time.monotonic()
        super().__init__(_plain(what), **options)

    @property
    def renderable(self) -> RenderableType:  # type: ignore[override] # it takes any
        return self

    def __rich__(self) -> Table:
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        seconds = int(time.monotonic() - self._began)
        elapsed = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        line.add_row(self._spinner, Text(elapsed, "yellow"))
        return line

    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(None if status is None else _plain(status), **options)


def _plain(what: RenderableType) -> RenderableType:
    return Text(visible(what)) if isinstance(what, str) else what


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Print lines as they are: no markup, no emoji, and nothing that steers a terminal."""
        if len(objects) == 1 and isinstance(objects[0], str):
            line = visible(objects[0])
            if not self.stderr and options.keys() <= {"markup"}:
                # As it would come out, in a hundredth of the time: a list has a million lines.
                self.file.write(line + "\n")
                return
        shown = (visible(o) if isinstance(o, str) else o for o in objects)
        super().print(*shown, **{"markup": False, "emoji": False, **options})

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show what is being done, and for how long, until the block is left."""
        return _TimedStatus(status, console=self, **options)


out = _Console(highlight=False, soft_wrap=True, emoji=False)
"""For results."""

err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
"""For everything else."""


def print_json(value: Any) -> None:
    """Print a result for programs."""
    for piece in json.JSONEncoder(indent=2).iterencode(value):  # a list may have a million files
        sys.stdout.write(piece)
    sys.stdout.write("\n")


def print_fields(fields: Iterable[str]) -> None:
    """Print one line of a list for programs, with tabs between its fields, which have none."""
    sys.stdout.write("\t".join(map(visible, fields)) + "\n")


def set_up_logging(*, verbose: bool) -> None:
    """Send logs to stderr, one line each; one that stderr does not take is lost, and counted."""
    streams.never_wait()
    level = logging.DEBUG if verbose else logging.INFO
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            made_visible,
            structlog.dev.ConsoleRenderer(colors=err.is_terminal, pad_event_to=0),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

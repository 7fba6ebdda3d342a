"""What a terminal shows while something is being done."""

from __future__ import annotations

import io
import re

from nbdproxy.cli import console
from tests.support.serving import until


def test_time_stands_beside_what_is_being_done() -> None:
    shown = io.StringIO()
    terminal = console._Console(
        file=shown, force_terminal=True, width=80, _environ={"TERM": "xterm"}
    )
    with terminal.status("reading") as status:
        until(lambda: "reading 0:00:00" in _plain(shown), "it is shown")
        status._began -= 3725  # type: ignore[attr-defined]
        status.update("reading [b]ad.img[/b]")  # a name, not markup
        until(lambda: "reading [b]ad.img[/b] 1:02:0" in _plain(shown), "the hour is shown")


def test_nothing_is_shown_where_nobody_looks() -> None:
    shown = io.StringIO()
    with console._Console(file=shown, width=80).status("reading"):
        pass
    assert shown.getvalue() == ""


def _plain(shown: io.StringIO) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())

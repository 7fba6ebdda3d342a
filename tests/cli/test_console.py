"""What a terminal shows while something is being done."""

from __future__ import annotations

import io
import re
import time

import pytest

from nbdproxy.cli import console


def test_time_stands_beside_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = console._TimedConsole(
        file=shown, force_terminal=True, width=80, _environ={"TERM": "xterm"}
    )
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with terminal.status("reading") as status:
        status.update("reading on")
        assert "reading on 0:00:00" in _plain(shown)
        now += 3725
        status.update("reading [b]ad.img[/b]")  # a name, not markup
        assert "reading [b]ad.img[/b] 1:02:05" in _plain(shown)


def test_nothing_is_shown_where_nobody_looks() -> None:
    shown = io.StringIO()
    with console._TimedConsole(file=shown, width=80).status("reading"):
        pass
    assert shown.getvalue() == ""


def _plain(shown: io.StringIO) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())

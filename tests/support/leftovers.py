"""Whatever a test run starts ends with it, however that ends: in order, by Ctrl-C, or killed.

`guard` puts a mark into the environment, which all that this process starts inherits, and starts a
watcher beside it. When this process is gone, the watcher kills whatever has the mark: daemons in
sessions of their own too. Run as a program, this file is the watcher.

Does not cover what is started with an environment of its own, and forks that execute nothing.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

_NAME = "NBDPROXY_TEST_RUNS"
_SCANS = 2
"""So often in a row nothing is found: what ended during a scan may have started something."""
_GIVE_UP_S = 60.0

_watchers: list[subprocess.Popen[bytes]] = []


def guard() -> None:
    """Let all that this process starts from now on end with it."""
    mark = uuid.uuid4().hex
    environment = dict(os.environ)  # the watcher's is without the mark
    os.environ[_NAME] = f"{environment.get(_NAME, '')}:{mark}"
    words = [sys.executable, "-IS", __file__, mark, str(os.getpid())]
    silent = subprocess.DEVNULL
    # In a session of its own, so that Ctrl-C does not reach it.
    _watchers.append(
        subprocess.Popen(
            words,
            env=environment,
            stdin=silent,
            stdout=silent,
            stderr=silent,
            start_new_session=True,
        )
    )


def _watch(mark: str, pid: int) -> None:
    """Wait until a process is gone, then kill what has the mark."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    empty, deadline = 0, time.monotonic() + _GIVE_UP_S
    while empty < _SCANS and time.monotonic() < deadline:
        found = _marked(mark.encode())
        for one in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        empty = 0 if found else empty + 1
        time.sleep(0.02)


def _marked(mark: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]))

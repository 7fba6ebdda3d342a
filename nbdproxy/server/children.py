"""The processes of a command: it, and all that it started, however often they forked.

They stay in our process group, as the terminal's keys are for them too, and they need it for
passwords. So they are known by a variable of their environment, which the kernel shows in /proc.
Not covered: what asked to live on (a daemon, in a session of its own), what cleared its
environment, and what runs as another user.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

_NAME = "NBDPROXY_COMMANDS"


class Children:
    """The processes of one command, which is to be started with `environment`."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        outer = os.environ.get(_NAME, "")  # of a command that we are part of
        self.environment = {_NAME: f"{outer} {self._token}".strip()}

    def signal(self, number: int) -> bool:
        """Send them a signal; tell whether there were any."""
        found = [pid for pid in _processes() if self._has(pid)]
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        return bool(found)

    def _has(self, pid: int) -> bool:
        try:
            told = Path(f"/proc/{pid}/environ").read_bytes()
            return self._token.encode() in told and os.getsid(pid) == os.getsid(0)
        except OSError:  # ended, or somebody else's
            return False


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - names

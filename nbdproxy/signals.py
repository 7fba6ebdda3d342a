"""Which signals end a command in order."""

from __future__ import annotations

import signal


def told_to_end() -> list[signal.Signals]:
    """Return the signals, besides Ctrl-C, that tell us to end in order.

    SIGHUP is one, when the terminal is closed, unless who started us ignores it, as nohup(1) does.
    """
    found = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found

"""Which signals end a command in order, and what they do not interrupt."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


def told_to_end() -> list[signal.Signals]:
    """Return the signals, besides Ctrl-C, that tell us to end in order.

    SIGHUP is one, when the terminal is closed, unless who started us ignores it, as nohup(1) does.
    """
    found = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


_interrupted = False


def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - the form of a signal handler
    """Raise KeyboardInterrupt, as a signal handler, and remember it for `check`."""
    global _interrupted  # noqa: PLW0603 - signals are the process's
    _interrupted = True
    raise KeyboardInterrupt


def check() -> None:
    """Raise KeyboardInterrupt if `interrupt` did: a destructor, or numpy, drops what is raised."""
    if _interrupted:
        raise KeyboardInterrupt


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let no signal that ends a command interrupt what is done here; it is heeded right after.

    Only for the main thread. Processes that are started here begin with Ctrl-C blocked.
    """
    # Blocked, a signal may still come to another thread; and it is this one that Python has raise.
    noted: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: noted.append(number))
        for number in (signal.SIGINT, *told_to_end())
    }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in dict.fromkeys(noted):
            signal.raise_signal(one)

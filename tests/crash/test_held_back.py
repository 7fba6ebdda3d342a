"""Signals while something is done that none of them may end halfway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nbdproxy.signals import held_back


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heeded_right_after(number: signal.Signals) -> None:
    """Also one that comes to another thread, as it is this one then in which Python raises."""
    done: list[str] = []
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), held_back():
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            done.append("all of it")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
        ended.set()
        other.join()
    assert done == ["all of it"]


def test_what_is_started_meanwhile_begins_with_ctrl_c_blocked() -> None:
    asked = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    words = [sys.executable, "-c", asked]
    with held_back():
        assert subprocess.check_output(words) == b"True\n"
    assert subprocess.check_output(words) == b"False\n"


def test_an_interruption_that_was_dropped_is_raised_again() -> None:
    code = (
        "import signal\nfrom nbdproxy import signals\n"
        "signal.signal(signal.SIGINT, signals.interrupt)\nsignals.check()\n"
        "class Drops:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "Drops()\nprint('dropped')\n"
        "try: signals.check()\nexcept KeyboardInterrupt: print('raised')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "dropped\nraised\n"

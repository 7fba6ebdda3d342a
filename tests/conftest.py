"""What holds for all tests."""

import signal

from tests.support import leftovers

leftovers.guard()

# Who starts tests in the background of a script has Ctrl-C ignored, and so has all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

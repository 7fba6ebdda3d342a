"""What holds for all tests."""

import signal

from tests.support import leftovers

leftovers.guard()

# Who starts tests in the background of a script has Ctrl-C ignored, or with nohup(1) the end of the
# terminal, and so has all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

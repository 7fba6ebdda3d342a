"""The NBD server: sockets, threads and signals. With `state_server` the only room that uses trio.

Its log goes to stderr in every process that imports it, workers too, from warnings on: stdout is
for results. A command that serves says more, in its own way.
"""

import logging
import sys
from contextlib import suppress

import structlog

from nbdproxy.printable import made_visible


class _StderrLogger(structlog.PrintLogger):
    """Whatever is stderr when something is said; one that cannot be written ends nothing."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            super().msg(message)

    warn = warning = err = error = critical = exception = msg


if not structlog.is_configured():
    *_before, _rendered = structlog.get_config()["processors"]
    structlog.configure(
        processors=[*_before, made_visible, _rendered],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_: _StderrLogger(),
    )

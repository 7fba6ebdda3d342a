"""The shell: sockets, threads and signals. The only room that knows trio.

Its log goes to stderr in every process that imports it, workers too, from warnings on: stdout is
for results. A command that serves says more, in its own way.
"""

import logging
import sys

import structlog

if not structlog.is_configured():
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        # Whatever is stderr when something is said.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )

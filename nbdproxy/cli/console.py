"""What every command shares: where text goes, how errors look, how logs look.

Results go to stdout; logs, hints and progress to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import structlog
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
"""For results."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""For everything else."""


def print_json(value: Any) -> None:
    """Print a result for programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def set_up_logging(*, verbose: bool) -> None:
    """Send logs to stderr, one line each."""
    level = logging.DEBUG if verbose else logging.INFO
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=err.is_terminal, pad_event_to=0),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

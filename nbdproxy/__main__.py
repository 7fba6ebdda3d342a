"""`python -m nbdproxy` is `nbdproxy`: what both run, and Ctrl-C ends without a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; 130 if it is interrupted, while it is imported too."""
    try:
        from nbdproxy.cli.app import main as run  # noqa: PLC0415 - it takes a while

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

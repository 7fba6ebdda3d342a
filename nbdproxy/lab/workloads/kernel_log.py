"""The kernel's errors, kept out of what a workload prints and printed behind it.

The kernel writes to the console while others do, in the middle of their lines. A workload whose
lines are parsed begins with `HUSH` and ends with `TELL`. Does not cover what the kernel says before
the workload begins, and a guest that never gets to its end.
"""

from __future__ import annotations

import re

HUSH = "dmesg -n 1"
"""Shell: only a dying kernel speaks on the console from here on."""

TELL = "dmesg -r | sed -n 's/^<[0-3]>/kernel: /p'"
"""Shell: print what the kernel logged as errors since its boot, `kernel: ...` each."""

_TOLD = re.compile(r"^kernel: (?:\[ *\d+\.\d+\] )?(.*)$", re.MULTILINE)


def kernel_errors(serial: str) -> tuple[str, ...]:
    """Return the kernel's errors, without their times, out of what a guest printed."""
    return tuple(found.strip() for found in _TOLD.findall(serial))

"""The table of all checks: importing this module fills it.

Each theme is a module of its own: `handshake`, `exports`, `tls`, `data`, `errors`, `durable`,
`structured`, `metadata`, `extended`, `attacks_early`, `attacks_late` and
`upstream`.
"""

from __future__ import annotations

from tests.blackbox import (
    attacks_early,
    attacks_late,
    data,
    durable,
    errors,
    exports,
    extended,
    handshake,
    metadata,
    structured,
    tls,
    upstream,
)
from tests.blackbox.check import CHECKS, Check, Feature

THEMES = (
    *(handshake, exports, tls, data, errors, durable),
    *(structured, metadata, extended, attacks_early, attacks_late, upstream),
)


def all_checks() -> list[Check]:
    """Return all checks in the order of the table's features."""
    order = list(Feature)
    return sorted(CHECKS.values(), key=lambda check: order.index(check.feature))

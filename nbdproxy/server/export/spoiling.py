"""Breaks a reply as a rule says: wrong magic or cookie, sent twice, garbage, or cut short."""

from __future__ import annotations

from collections.abc import Sequence

from nbdproxy.dice import DrawKey
from nbdproxy.policy.actions import Action, ActionKind, Moment, Violation
from nbdproxy.policy.engine import Decision

_COOKIE = 8
"""Where the cookie stands in each kind of reply (proto.md, "Simple reply message" and on)."""

Parts = list[memoryview]


def spoiled(decision: Decision | None, parts: Parts) -> tuple[Parts, bool]:
    """Return what is sent in place of a reply, and whether the connection is dropped then."""
    action = decision.action if decision is not None else None
    if decision is None or action is None:
        return parts, False
    if action.kind is ActionKind.VIOLATE:
        return _violated(action, decision.draw_key, parts), False
    if action.kind is ActionKind.DISCONNECT:
        if action.moment is Moment.MIDDLE:
            return [memoryview(_joined(parts)[: action.at_byte])], True
        return parts, True
    return parts, False


def _violated(action: Action, draw_key: DrawKey, parts: Parts) -> Parts:
    reply = _joined(parts)
    match action.violation:
        case Violation.MAGIC:
            reply[0] ^= 0xFF
        case Violation.COOKIE:
            for at in range(_COOKIE, _COOKIE + 8):
                reply[at] ^= 0xA5
        case Violation.TWICE:
            reply *= 2
        case Violation.GARBAGE:
            reply[:] = bytes(draw_key.draw_below(256, "garbage", at) for at in range(len(reply)))
    return [memoryview(reply)]


def _joined(parts: Sequence[memoryview]) -> bytearray:
    return bytearray(b"".join(parts))

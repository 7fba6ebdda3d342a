"""Crash states: a printable id, and with the recording the disk that it names."""

from __future__ import annotations

from nbdproxy.crash.naming import Choice, StateId, parse_state_id
from nbdproxy.crash.timeline import CrashDisk, open_state
from nbdproxy.persistence.model import kept, sent
from nbdproxy.recording.index import Mask, RequestTable

__all__ = ["Choice", "CrashDisk", "StateId", "chosen", "open_state", "parse_state_id"]


def chosen(table: RequestTable, state: StateId) -> Mask:
    """Return the requests that are on the disk in a state that is MUST or ALL."""
    if state.choice is Choice.ALL:
        return sent(table, state.position)
    return kept(table, state.position, state.level, state.options)

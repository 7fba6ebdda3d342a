"""The table cache mode x failure as `nbdproxy replay --json` prints it."""

from __future__ import annotations

from nbdproxy.crash.cuts import Cut
from nbdproxy.crash.replay import Outcome, Replay
from nbdproxy.crash.source import Source
from nbdproxy.oracles.condition import Condition


def to_json(
    result: Replay, source: Source, recording: str, *, files: bool = False
) -> dict[str, object]:
    """Return the table as `nbdproxy replay --json` prints it; `files` adds those that are lost."""
    return {
        "recording": recording,
        "cut": _cut_json(result.cut, source),
        "files": len(result.manifest.entries),
        "recorded_under": sorted(mode.value for mode in result.recorded_under),
        "left_out": [mode.value for mode in result.left_out],
        "why_left_out": result.why or None,
        "remark": result.remark or None,
        "cells": [
            {
                "mode": cell.mode.value,
                "failure": cell.failure.value,
                "cut": _cut_json(cell.cut, source),
                "verdict": cell.verdict.value,
                "worst": _outcome_json(cell.worst, files=files),
                "best": _outcome_json(cell.best, files=files),
            }
            for cell in result.cells
        ],
    }


def _cut_json(cut: Cut, source: Source) -> dict[str, object]:
    return {
        "text": cut.text,
        "position": cut.position,
        "time_s": cut.time_ns(source) / 1e9,
        "note": cut.note,
    }


def _outcome_json(outcome: Outcome, *, files: bool) -> dict[str, object]:
    found: dict[str, object] = {
        "state": str(outcome.state),
        "verdict": outcome.verdict.value,
        "conditions": {key.value: n for key, n in outcome.conditions.most_common()},
        "causes": {key.value: n for key, n in outcome.causes.most_common()},
    }
    if outcome.reason is not None:
        found["reason"] = outcome.reason
    if files:
        found["files"] = {
            path: {"condition": one.condition.value, "cause": one.cause and one.cause.value}
            for path, one in outcome.files.items()
            if one.condition is not Condition.WHOLE
        }
    return found

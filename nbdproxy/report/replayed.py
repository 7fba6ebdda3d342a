"""The table cache mode x failure as `nbdproxy replay --json` prints it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from nbdproxy.crash.blame.replay import FileOutcome, StateOutcome
from nbdproxy.crash.blame.together import Together
from nbdproxy.crash.states.cuts import Cut
from nbdproxy.crash.states.source import Source
from nbdproxy.report import table


def to_json(
    together: Together, sources: Sequence[Source], names: Sequence[str], *, files: bool = False
) -> dict[str, object]:
    """Return the table as `nbdproxy replay --json` prints it; `files` adds those that are lost.

    Of several recordings the states and cuts are those of the first, and `recorded_under` is what
    all can have been; `recordings` has those of each.
    """
    result, source = together.table, sources[0]
    return {
        "recording": names[0],
        "cut": _cut_json(result.cut, source),
        "files": len(result.manifest.entries),
        "recorded_under": sorted(mode.value for mode in result.recorded_under),
        "left_out": [mode.value for mode in result.left_out],
        "why_left_out": result.why or None,
        "remark": result.remark or None,
        "doubt": table.doubt(result),
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
        "mounts": [
            {"recording": name, "point": m.point, "partition": m.partition, "root": m.root}
            for name, replay in zip(names, together.each, strict=True)
            for m in replay.tree.mounts
        ],
        **_each_json(together, sources, names),
    }


def _each_json(
    together: Together, sources: Sequence[Source], names: Sequence[str]
) -> dict[str, object]:
    """Return the states of each recording, if there are several."""
    if len(sources) == 1:
        return {}
    return {
        "recordings": [
            {
                "recording": name,
                "files": len(one.manifest.entries),
                "recorded_under": sorted(mode.value for mode in one.recorded_under),
                "left_out": [mode.value for mode in one.left_out],
                "why_left_out": one.why or None,
                "remark": one.remark or None,
                "cells": [
                    {
                        "mode": cell.mode.value,
                        "failure": cell.failure.value,
                        "cut": _cut_json(cell.cut, source),
                        "worst": str(cell.worst.state),
                        "best": str(cell.best.state),
                    }
                    for cell in one.cells
                ],
            }
            for name, source, one in zip(names, sources, together.each, strict=True)
        ]
    }


def _cut_json(cut: Cut, source: Source) -> dict[str, object]:
    return {
        "text": cut.text,
        "position": cut.position,
        "time_s": cut.time_ns(source) / 1e9,
        "note": cut.note,
    }


def _file_json(one: FileOutcome) -> dict[str, str | None]:
    return {"condition": one.condition.value, "cause": one.cause and one.cause.value}


def _outcome_json(outcome: StateOutcome, *, files: bool) -> dict[str, object]:
    found: dict[str, object] = {
        "state": str(outcome.state),
        "verdict": outcome.verdict.value,
        "conditions": {key.value: n for key, n in outcome.conditions.most_common()},
        "causes": {key.value: n for key, n in outcome.causes.most_common()},
    }
    if outcome.reason is not None:
        found["reason"] = outcome.reason
    if files:
        told = functools.cache(_file_json)  # a million files, and few that differ
        found["files"] = {p: told(one) for p, one in outcome.files.items() if not one.is_whole}
    return found

"""`nbdproxy info`: sum a recording up."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nbdproxy.cli.console import err, out, print_json
from nbdproxy.cli.recorded import recorded
from nbdproxy.crash.states.taken import taken_under
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.persistence.modes import CacheMode, Taken
from nbdproxy.printable import printable
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording, command_name
from nbdproxy.sizes import plural, size_text


def info(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every payload's digest, too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sum a recording up: what was recorded, how much, by whom, and how it ended.

    With --verify, exit code 2 if something of it is damaged or lost.

    Examples:

      nbdproxy info run1

      nbdproxy info run1 --verify --json
    """
    with recorded(run, note=False) as recording:
        if verify:
            with err.status("checking payloads"):
                recording.verify()
        with closing(Timeline(recording)) as timeline:
            taken = taken_under(timeline)
        facts = _facts(recording, taken)
        if json:
            print_json(facts)
        else:
            _print(run, recording, facts, taken)
    if verify and recording.is_damaged:
        raise typer.Exit(2)


def _print(run: Path, recording: Recording, facts: dict[str, Any], taken: Taken) -> None:
    meta = recording.meta
    image, policies = printable(meta.image), printable(", ".join(meta.policies))
    out.print(f"{run}: {image} ({size_text(meta.size)}), policy {policies}")
    out.print(f"recorded    {meta.started}, {facts['seconds']:.3f} s, by {printable(meta.program)}")
    out.print(f"ended       {printable(facts['ended'])}")
    if recording.missing:
        out.print(f"missing     {recording.missing}", markup=False)
    for name, counted in facts["requests"].items():
        out.print(
            f"{name:<11} {counted['count']:,} ({size_text(counted['bytes'])}), "
            f"{counted['fua']:,} with FUA, {counted['failed']:,} failed, "
            f"{counted['unanswered']:,} unanswered"
        )
    out.print(f"refused     {facts['refused']:,} before they reached the disk")
    out.print(f"clients     {facts['connections']:,}")
    out.print(f"cache mode  {_cache_mode(taken)}")
    for fault in facts["faults"]:
        what = (
            f"{fault['action']} {plural(fault['count'], 'time')} by {fault['rule'] or 'the policy'}"
        )
        out.print(f"fault       {printable(what)}")
    for note in facts["notes"]:
        text = printable(note["text"])
        out.print(f"note        {note['time_s']:.3f} s {note['kind']} {text}")


def _faults(recording: Recording) -> Counter[tuple[str | None, str]]:
    """Return how often each rule did what."""
    faults = [note.fields for note in recording.notes if note.kind is NoteKind.FAULT]
    return Counter(
        (str(f["rule"]) if f.get("rule") else None, str(f.get("action"))) for f in faults
    )


def _cache_mode(taken: Taken) -> str:
    """Say which it may have been, and why that cannot be told better."""
    if len(taken.modes) == len(CacheMode):
        return f"cannot be told: {taken.why or 'nothing was written'}"
    modes = ", ".join(mode.value for mode in CacheMode if mode in taken.modes)
    text = f"one of {modes}: these look alike on the wire"
    return f"{text} ({taken.remark})" if taken.remark else text


def _facts(recording: Recording, taken: Taken) -> dict[str, Any]:
    table = recording.table
    requests = {}
    for command in np.unique(table.command).tolist():
        rows = table.command == command
        requests[command_name(command)] = {
            "count": int(np.count_nonzero(rows)),
            "bytes": int(table.length[rows].sum()),
            "fua": int(np.count_nonzero(rows & table.is_fua)),
            "failed": int(np.count_nonzero(rows & (table.error != 0))),
            "unanswered": int(np.count_nonzero(rows & (table.completed == NEVER))),
        }
    connections = [note for note in recording.notes if note.kind is NoteKind.CONNECT]
    shown = {NoteKind.MARK, NoteKind.QMP, NoteKind.CUT, NoteKind.LOSS}
    return {
        "recording": str(recording.path),
        "image": recording.meta.image,
        "size": recording.meta.size,
        "overlay": recording.meta.overlay,
        "policies": list(recording.meta.policies),
        "started": recording.meta.started,
        "program": recording.meta.program,
        "seconds": recording.time_of(recording.events - 1) / 1e9,
        "events": recording.events,
        "ended": recording.ending.reason if recording.ending else "not in order",
        "missing": recording.missing,
        "requests": requests,
        "refused": recording.refused,
        "connections": len(connections),
        "faults": [
            {"rule": rule, "action": action, "count": count}
            for (rule, action), count in _faults(recording).items()
        ],
        "recorded_under": sorted(mode.value for mode in taken.modes),
        "notes": [
            {"seq": n.seq, "time_s": n.time_ns / 1e9, "kind": n.kind.value, "text": n.text}
            for n in recording.notes
            if n.kind in shown
        ],
    }

"""`nbdproxy log`: list what passed."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nbdproxy import streams
from nbdproxy.cli.choices import parse_range, parse_words
from nbdproxy.cli.recorded import code_at, recorded
from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.printable import printable
from nbdproxy.recording.format import SlotKind
from nbdproxy.recording.index import NEVER
from nbdproxy.recording.notes import Note, NoteKind
from nbdproxy.recording.reader import Event, command_name
from nbdproxy.requests import Command, CommandFlag, error_name

_COMMANDS = ("write", "write-zeroes", "trim", "flush")
_TYPES = (*_COMMANDS, *(kind.value for kind in NoteKind))


def log(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    kind: Annotated[
        str | None, typer.Option("--type", metavar="TYPE,...", help=f"Of: {', '.join(_TYPES)}.")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", metavar="CUT", help="From here.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="CUT", help="Up to here.")] = None,
    within: Annotated[
        str | None, typer.Option("--range", metavar="A-B", help="Only what touches these bytes.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List requests and notes in the order received, one a line.

    Columns: seq, seconds, connection, what, flags, offset + length in bytes, outcome. Exit code 2
    if events are lost that were asked for: all others are listed.

    Examples:

      nbdproxy log run1 --type flush

      nbdproxy log run1 --from time:3s --to before-exit --range 0-1M --json
    """
    types = parse_words(kind, _TYPES, "--type") if kind is not None else _TYPES
    reach = parse_range(within) if within is not None else None
    with recorded(run) as source:
        first = resolve(source, start).position if start is not None else 0
        last = resolve(source, end).position if end is not None else source.events
        _list(source, (first, last), types, reach, as_json=json)
        raise typer.Exit(code_at(source, last))


def _list(
    source: RecordedSource,
    span: tuple[int, int],
    types: Sequence[str],
    reach: tuple[int, int] | None,
    *,
    as_json: bool,
) -> None:
    for item in _items(source, *span):
        if streams.reader_gone():  # as in `... | head`
            return
        if item["type"] not in types:
            continue
        if reach is not None and not (
            item.get("offset", reach[1]) < reach[1] and item["offset"] + item["length"] > reach[0]
        ):
            continue
        sys.stdout.write((jsonlib.dumps(item) if as_json else _line(item)) + "\n")


def _items(source: RecordedSource, first: int, last: int) -> Iterator[dict[str, Any]]:
    notes = {note.seq: note for note in source.notes}
    for event in source.log(first, last):
        if event.kind is SlotKind.RECEIVED:
            yield _request(source, event)
        elif event.seq in notes:
            yield _note(notes[event.seq])


def _note(note: Note) -> dict[str, Any]:
    item: dict[str, Any] = {
        "seq": note.seq,
        "time_s": note.time_ns / 1e9,
        "connection": note.connection,
        "type": note.kind.value,
        "text": note.text,
    }
    if note.kind is NoteKind.FAULT and {"action", "command"} & note.fields.keys():
        item |= {"fault": note.fields}
    return item


def _request(source: RecordedSource, event: Event) -> dict[str, Any]:
    row = source.table.rows_before(event.seq)
    completed, error = int(source.table.completed[row]), int(source.table.error[row])
    answered = completed != NEVER
    item: dict[str, Any] = {
        "seq": event.seq,
        "time_s": event.time_ns / 1e9,
        "connection": event.connection,
        "type": command_name(event.command),
        "flags": [flag.name for flag in CommandFlag(event.flags) if flag.name],
        "cookie": event.cookie,
        "completed": completed if answered else None,
        "completed_s": source.time_of(completed) / 1e9 if answered else None,
        "error": error_name(error) if error else None,
    }
    if event.command != Command.FLUSH:
        item |= {"offset": event.offset, "length": event.length}
    return item


def _line(item: dict[str, Any]) -> str:
    head = f"{item['seq']:>8} {item['time_s']:>12.6f} {item['connection']:>3} {item['type']:<12}"
    if "fault" in item:
        return f"{head} {_fault(item['fault'])}"
    if "text" in item:
        return f"{head} {printable(item['text'])}"
    place = f"{item['offset']:>14} + {item['length']:<10}" if "offset" in item else " " * 27
    if item["completed"] is None:
        outcome = "unanswered"
    else:
        took = (item["completed_s"] - item["time_s"]) * 1e6
        outcome = f"{item['error'] or 'ok'} at {item['completed']} after {took:.0f} us"
    return f"{head} {','.join(item['flags']):<8} {place} {outcome}"


def _fault(fault: dict[str, Any]) -> str:
    """Return what a rule did, in words."""
    if "rule" not in fault:
        rest = ", ".join(f"{key} {value}" for key, value in fault.items() if key != "action")
        return printable(f"{fault.get('action')} {rest}".rstrip())
    where = f" {fault['seq']}" if "seq" in fault else ""
    place = f" at {fault['offset']} + {fault.get('length')}" if "offset" in fault else ""
    delay = fault.get("delay_s")
    late = f" after {delay:g} s" if isinstance(delay, int | float) else ""
    text = f"{fault.get('action')} of {fault.get('command')}{where}{place}{late} by {fault['rule']}"
    return printable(text)

"""`nbdproxy ctl`: tell a running `nbdproxy serve --control SOCKET` what to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from nbdproxy.cli.choices import JsonOption
from nbdproxy.cli.console import err, out, print_json
from nbdproxy.errors import UsageError
from nbdproxy.peers import TrustedPeers
from nbdproxy.sizes import plural, size_text

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_ANSWER_MAX = 1 << 24
"""Bytes of an answer; `status` has some hundred for each export and rule."""

ExportOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Only this export.", show_default="all of them"),
]


@app.callback()
def ctl(
    context: typer.Context,
    control: Annotated[Path, typer.Argument(metavar="SOCKET", help="As serve --control has it.")],
) -> None:
    """Tell a running nbdproxy what to do; each command returns when it is done.

    Start one with: nbdproxy serve disk.img --control vm/ctl.sock

    Examples:

      nbdproxy ctl vm/ctl.sock status

      nbdproxy ctl vm/ctl.sock mark installed

      nbdproxy ctl vm/ctl.sock policy fsyncgate --set nth=2

      nbdproxy ctl vm/ctl.sock cut
    """
    context.obj = control


@app.command()
def status(context: typer.Context, export: ExportOption = None, json: JsonOption = False) -> None:
    """Show what is served, under which policy, and what passed.

    Example: nbdproxy ctl vm/ctl.sock status --json
    """
    answer = _ask(context, {"do": "status"}, export)
    if json:
        print_json(answer)
        return
    out.print(f"power {answer['power']}")
    for one in answer["exports"]:
        policy, paused = "+".join(one["policies"]), ", paused" if one["paused"] else ""
        out.print(
            f"{one['name'] or '(default)'}: {one['description']}, {size_text(one['size'])}, "
            f"policy {policy}, seed {one['seed']}{paused}",
            markup=False,
        )
        out.print(
            f"  {plural(one['writes'], 'write')} ({size_text(one['written_bytes'])}), "
            f"{plural(one['flushes'], 'flush')}, {plural(one['reads'], 'read')}; "
            f"{size_text(one['held_bytes'])} held, {size_text(one['shown_bytes'])} faulty"
        )
        for rule, count in one["rules"].items():
            out.print(f"  rule {rule} struck {plural(count, 'time')}", markup=False)
        if one["recording"] is not None:
            out.print(f"  recording to {one['recording']}, event {one['events']}", markup=False)
        if one["failure"] is not None:
            out.print(f"  failed: {one['failure']}", markup=False)


@app.command()
def cut(context: typer.Context, json: JsonOption = False) -> None:
    """Cut the power of all exports: what the policy holds back is gone.

    Example: nbdproxy ctl vm/ctl.sock cut
    """
    answer = _ask(context, {"do": "cut"}, None)
    if json:
        print_json(answer)
    else:
        err.print(f"the power is cut: {size_text(answer['held_bytes'])} were held back")


@app.command()
def mark(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="For --at mark:NAME, and rules with since and until.")
    ],
    export: ExportOption = None,
    json: JsonOption = False,
) -> None:
    """Mark this instant in the recording.

    Example: nbdproxy ctl vm/ctl.sock mark installed
    """
    answer = _ask(context, {"do": "mark", "name": name}, export)
    if json:
        print_json(answer)
    elif answer["seq"]:
        err.print(f"marked; later: nbdproxy replay RUN --at mark:{name}", markup=False)
    else:
        err.print("marked for the rules; there is no recording", markup=False)


@app.command()
def pause(context: typer.Context, export: ExportOption = None) -> None:
    """Let no request begin, finish those at work, and make all of it durable on the image.

    Example: nbdproxy ctl vm/ctl.sock pause && cp disk.img copy.img
    """
    with err.status("finishing what was begun"):
        _ask(context, {"do": "pause"}, export)


@app.command()
def resume(context: typer.Context, export: ExportOption = None) -> None:
    """Let requests go on after a pause.

    Example: nbdproxy ctl vm/ctl.sock resume
    """
    _ask(context, {"do": "resume"}, export)


@app.command()
def policy(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="The new policies.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for serve.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="As for serve.", show_default="as it was")
    ] = None,
    export: ExportOption = None,
) -> None:
    """Let other policies come into force; what was held is made durable, faults are lifted.

    Examples:

      nbdproxy ctl vm/ctl.sock policy bad-sectors

      nbdproxy ctl vm/ctl.sock policy passthrough
    """
    # A path is read by the server, which may stand in another folder.
    absolute = [
        str(Path(name).absolute()) if "/" in name or name.endswith(".toml") else name
        for name in names
    ]
    asked = {"do": "policy", "names": absolute, "settings": settings or [], "seed": seed}
    answer = _ask(context, asked, export)
    err.print(f"the policy is {answer['policy']}", markup=False)


@app.command()
def lift(context: typer.Context, export: ExportOption = None) -> None:
    """Let reads show what the disk holds: writes that were lost, torn or misdirected come back.

    Example: nbdproxy ctl vm/ctl.sock lift
    """
    answer = _ask(context, {"do": "lift"}, export)
    err.print(f"{size_text(answer['lifted_bytes'])} read again as they are")


def _ask(context: typer.Context, asked: dict[str, Any], export: str | None) -> dict[str, Any]:
    """Send a command and wait for its answer; UsageError if it was not done."""
    path: Path = context.obj
    if export is not None:
        asked["export"] = export
    believed = TrustedPeers(None, "run this command as that user if its server is meant")
    try:
        believed.check_path(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(path))
            believed.check_listener(sock, path)
            sock.sendall(json.dumps(asked).encode() + b"\n")
            line = sock.makefile("rb").readline(_ANSWER_MAX)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"{path} does not answer ({reason}); is nbdproxy serve --control {path} running?"
        ) from None
    if not line.endswith(b"\n"):
        raise UsageError(
            f"{path} went away before it answered: its server ended, or others keep all its places "
            "busy; look at what nbdproxy serve says"
        )
    answer: dict[str, Any] = json.loads(line)
    if not answer.pop("ok"):
        raise UsageError(answer["error"])
    return answer

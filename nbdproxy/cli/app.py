"""The command `nbdproxy`: collects the commands, and turns our errors into one sentence.

A command's module is imported when the command is asked for: all of them take over a second.
"""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections import UserDict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nbdproxy import __version__, machine, streams
from nbdproxy.cli.console import err
from nbdproxy.errors import NbdproxyError
from nbdproxy.signals import told_to_end

COMMANDS = {
    "serve": "serve:serve",
    "info": "info:info",
    "log": "log:log",
    "replay": "replay:replay",
    "explain": "explain:explain",
    "audit": "audit:audit",
    "check": "check:check",
    "manifest": "manifest:manifest",
    "explore": "explore:explore",
    "minimize": "minimize:minimize",
    "open": "open:open_",
    "extract": "extract:extract",
    "timeline": "timeline:timeline",
    "convert": "convert:convert",
    "pack": "pack:pack",
    "unpack": "pack:unpack",
    "policy": "policy:app",
    "ctl": "ctl:app",
    "lab": "lab:app",
}
"""In the order of the help: the module in this package, and its function or group of commands."""


class _Imported(UserDict[str, Any]):
    """The commands by their names; one that is asked for is imported."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = super().__getitem__(name).partition(":")
        found = getattr(importlib.import_module(f"nbdproxy.cli.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            alone.command(name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = name
        return command


class _Commands(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Imported(COMMANDS)


app = typer.Typer(
    name="nbdproxy",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nbdproxy {__version__}")
        raise typer.Exit


@app.callback()
def nbdproxy(
    _version_asked: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Find out who lost your files: the guest, QEMU's cache mode, or the storage.

    nbdproxy is an NBD server between QEMU and a disk image. It records every write and flush, can
    break the disk on purpose, and replays the recording: which files would have survived which
    failure under which cache mode.

    A first round: record a VM, end nbdproxy when it is off, say what should be there, and ask.

      nbdproxy serve disk.img --record run1

      nbdproxy manifest ./node_modules > files

      nbdproxy replay run1 --files files
    """


def main() -> None:
    """Run the command line; exit codes: 0 fine, 1 loss or failure found, 2 unusable input."""
    streams.guard()
    # What was begun is ended, files and guests, as with Ctrl-C; a command may have its own way.
    for number in told_to_end():
        signal.signal(number, _end)
    try:
        try:
            app()
        finally:
            streams.finish()
    except NbdproxyError as error:
        err.print(f"nbdproxy: {error}", markup=False)
        sys.exit(2)
    except Exception as error:  # 1 would say that a loss was found
        if (said := machine.said_of(error)) is not None:
            err.print(f"nbdproxy: {said}", markup=False)
            sys.exit(2)
        for line in traceback.format_exc().splitlines():
            err.print(line, markup=False)
        err.print("nbdproxy: this is a fault of nbdproxy; please report it with these lines")
        sys.exit(2)


def _end(number: int, frame: object) -> None:  # noqa: ARG001 - the form of a signal handler
    streams.give_up()
    raise SystemExit(128 + number)

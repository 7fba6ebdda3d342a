"""The command `nbdproxy`: collects the commands, and turns our errors into one sentence."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated

import typer

from nbdproxy import __version__
from nbdproxy.cli import ctl, lab, policy
from nbdproxy.cli.audit import audit
from nbdproxy.cli.check import check
from nbdproxy.cli.console import err
from nbdproxy.cli.convert import convert
from nbdproxy.cli.explain import explain
from nbdproxy.cli.explore import explore
from nbdproxy.cli.info import info
from nbdproxy.cli.log import log
from nbdproxy.cli.manifest import manifest
from nbdproxy.cli.minimize import minimize
from nbdproxy.cli.open import open_
from nbdproxy.cli.pack import pack, unpack
from nbdproxy.cli.replay import replay
from nbdproxy.cli.serve import serve
from nbdproxy.cli.timeline import timeline
from nbdproxy.errors import NbdproxyError

app = typer.Typer(
    name="nbdproxy",
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


app.command()(serve)
app.command()(info)
app.command()(log)
app.command()(replay)
app.command()(explain)
app.command()(audit)
app.command()(check)
app.command()(manifest)
app.command()(explore)
app.command()(minimize)
app.command(name="open")(open_)
app.command()(timeline)
app.command()(convert)
app.command()(pack)
app.command()(unpack)
app.add_typer(policy.app, name="policy")
app.add_typer(ctl.app, name="ctl")
app.add_typer(lab.app, name="lab")


def main() -> None:
    """Run the command line; exit codes: 0 fine, 1 loss or failure found, 2 unusable input."""
    # What was begun is ended, files and guests, as with Ctrl-C; a command may have its own way.
    signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except NbdproxyError as error:
        err.print(f"nbdproxy: {error}", markup=False)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `... | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception:  # 1 would say that a loss was found
        traceback.print_exc()
        err.print("nbdproxy: this is a fault of nbdproxy; please report it with these lines")
        sys.exit(2)


def _end(number: int, frame: object) -> None:  # noqa: ARG001 - the form of a signal handler
    raise SystemExit(128 + number)

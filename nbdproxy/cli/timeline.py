"""`nbdproxy timeline`: every crash state of a recording as an NBD export."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.cli.choices import BaseOption
from nbdproxy.cli.console import err, out, print_json, set_up_logging
from nbdproxy.cli.recorded import recorded
from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.server.front.endpoints import listen_unix
from nbdproxy.state_server.server import StateExports, cut_names, serve_states


def timeline(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    socket: Annotated[
        Path | None,
        typer.Option(help="Listen on this Unix socket.", show_default="one in a new folder"),
    ] = None,
    base: BaseOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Serve every crash state at once: an export's name is a CUT or the id of a state.

    A cut (end, before-exit, riskiest, seq:N, flush:N, time:12.5s, mark:NAME) is the disk with all
    that had been sent by then. What a client writes goes to a scratch overlay that ends with its
    connection. Ends with Ctrl-C.

    Examples:

      nbdproxy timeline run1 --socket vm/run1.sock

      nbdinfo --list 'nbd+unix:///?socket=vm/run1.sock'

      nbdcopy 'nbd+unix:///s1234.flushed.must?socket=vm/run1.sock' state.img

      qemu-system-x86_64 -snapshot -drive 'file=nbd+unix:///flush%3A3?socket=vm/run1.sock'
    """
    set_up_logging(verbose=False)
    with ExitStack() as stack:
        source = stack.enter_context(recorded(run, base))
        opened = stack.enter_context(Case([source])).timeline
        opened.base()
        if socket is None:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
            )
            socket = Path(folder) / "socket"
        endpoint = listen_unix(socket)
        stack.callback(endpoint.close)
        if json:
            names = cut_names(opened)
            print_json({"uri": endpoint.uri(""), "cuts": {n: endpoint.uri(n) for n in names}})
        else:
            out.print(endpoint.uri("end"), markup=False)
        out.file.flush()
        err.print(f"serving every state of {run}: put a CUT or a state id for 'end'", markup=False)
        serve_states(StateExports(opened), endpoint)

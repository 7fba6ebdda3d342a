"""`nbdproxy open`: a crash state as a disk."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.case.case import Case
from nbdproxy.case.states import StateChoice
from nbdproxy.cli.choices import BaseOption
from nbdproxy.cli.console import err, out, set_up_logging
from nbdproxy.cli.recorded import recorded
from nbdproxy.cli.states import State, StateAt, StateFailure, StateMode
from nbdproxy.disks.copying import write_sparse
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.errors import NbdproxyError, UsageError
from nbdproxy.policy import loader
from nbdproxy.private import New, new_file
from nbdproxy.server.below.image_store import ImageStore
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.endpoints import listen_unix
from nbdproxy.server.service import Setting, serve
from nbdproxy.server.shared.power import Power
from nbdproxy.sizes import size_text


class OutputFormat(StrEnum):
    """What --output writes."""

    RAW = "raw"
    QCOW2 = "qcow2"


def open_(
    run: Annotated[Path, typer.Argument(help="A recording.")],
    state: State = None,
    at: StateAt = None,
    mode: StateMode = None,
    failure: StateFailure = None,
    socket: Annotated[
        Path | None,
        typer.Option(help="Listen on this Unix socket.", show_default="one in a new folder"),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option("--run", metavar="COMMAND", help="Serve while this shell command runs."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the state here.")
    ] = None,
    output_format: Annotated[
        OutputFormat, typer.Option("--format", help="What to write.")
    ] = OutputFormat.RAW,
    base: BaseOption = None,
) -> None:
    """Open a crash state as a disk: serve it, run a command on it, or write it to a file.

    Nothing is copied: the disk is the image plus the recording. Writes go to a scratch overlay
    that ends with the command. --at alone is the disk with all that had been sent by then; with
    --mode and --failure it is the worst state that these allow.

    Examples:

      nbdproxy open run1 --at before-exit --mode none --failure host-power-loss -o crashed.img

      nbdproxy open run1 --state s1234.flushed.must --run 'nbdcopy "$uri" - | file -'

      nbdproxy open run1 --at end --socket vm/crashed.sock
    """
    set_up_logging(verbose=False)
    with ExitStack() as stack:
        source = stack.enter_context(recorded(run, base))
        timeline = stack.enter_context(Case([source])).timeline
        chosen = StateChoice(state, at, mode, failure).of(timeline)
        disk = timeline.open(chosen)
        timeline.base()
        if output is not None and command is not None:
            raise UsageError("-o writes the state to a file, --run serves it; drop one of them")
        if output is not None and os.path.lexists(output):
            raise UsageError(f"{output} exists; name a new file, or remove it first")
        if output is not None and output_format is OutputFormat.RAW:
            with _new(output) as made, err.status(f"writing {output}"):
                write_sparse(disk, made.fd)
            err.print(f"wrote state {chosen} to {output} ({size_text(disk.size)})", markup=False)
            return
        if output is not None:
            if shutil.which("qemu-img") is None:
                raise UsageError(
                    "qemu-img is not installed; apt-get install qemu-utils, or use raw"
                )
            made = stack.enter_context(_new(output))
            command = f'qemu-img convert -f raw -O qcow2 "$uri" {shlex.quote(str(made.path))}'
        if socket is None:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
            )
            socket = Path(folder) / "socket"
        endpoint = listen_unix(socket)
        stack.callback(endpoint.close)
        setting = Setting(endpoint, command=command)

        @asynccontextmanager
        async def opened(power: Power) -> AsyncIterator[Export]:
            export = Export(
                "",
                ImageStore(OverlayDisk(disk), power),
                loader.load("passthrough").policy,
                description=f"state {chosen} of {run}",
            )
            try:
                yield export
            finally:
                export.close()

        def announce(exports: Sequence[Export]) -> None:
            doing = "serving" if output is None else f"writing to {output}"
            err.print(f"{doing}: state {chosen} of {run}", markup=False)
            if command is None:
                out.print(setting.uri(exports[0]), markup=False)
                out.file.flush()

        outcome = serve([opened], setting, on_ready=announce)
        if output is not None and outcome.exit_code:
            raise typer.Exit(outcome.exit_code)  # what is there by then is not whole
    raise typer.Exit(outcome.exit_code)


@contextmanager
def _new(output: Path) -> Iterator[New]:
    """Have a file made beside `output`, which has its name afterwards if the block ends well."""
    try:
        with new_file(output) as made:
            yield made
            made.finish()
    except NbdproxyError:
        raise
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None

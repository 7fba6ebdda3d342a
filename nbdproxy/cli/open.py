"""`nbdproxy open`: a crash state as a disk."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.cli.choices import Base
from nbdproxy.cli.console import err, out, set_up_logging
from nbdproxy.cli.states import State, StateAt, StateFailure, StateMode, choose
from nbdproxy.crash.recorded import RecordedSource
from nbdproxy.crash.timeline import CrashDisk, Timeline
from nbdproxy.disks.copying import write_sparse
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import UsageError
from nbdproxy.policy import loader
from nbdproxy.server.endpoints import listen_unix
from nbdproxy.server.export import Export
from nbdproxy.server.power import Power
from nbdproxy.server.service import Setting, serve
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
    base: Base = None,
) -> None:
    """Open a crash state as a disk: serve it, run a command on it, or write it to a file.

    Nothing is copied: the disk is the image plus the recording. Writes go to a scratch overlay
    that ends with the command. --at alone is the disk with all that had been sent by then; with
    --mode and --failure it is the worst state that these allow.

    Examples:

      nbdproxy open run1 --at before-exit --mode none --failure host-power-loss -o crashed.img

      nbdproxy open run1 --state s1234.flushed.must --run 'nbdcopy "$uri" - | file -'

      nbdproxy open run1 --at end --socket /tmp/crashed.sock
    """
    set_up_logging(verbose=False)
    with ExitStack() as stack:
        timeline = Timeline(stack.enter_context(RecordedSource(run, image=base)))
        stack.callback(timeline.close)
        chosen = choose(timeline, state, at, mode, failure)
        disk = timeline.open(chosen)
        timeline.base()
        if output is not None and command is not None:
            raise UsageError("-o writes the state to a file, --run serves it; drop one of them")
        if output is not None and output.exists():
            raise UsageError(f"{output} exists; name a new file, or remove it first")
        if output is not None and output_format is OutputFormat.RAW:
            _write(disk, output)
            err.print(f"wrote state {chosen} to {output} ({size_text(disk.size)})", markup=False)
            return
        if output is not None:
            if shutil.which("qemu-img") is None:
                raise UsageError(
                    "qemu-img is not installed; apt-get install qemu-utils, or use raw"
                )
            command = f'qemu-img convert -f raw -O qcow2 "$uri" {shlex.quote(str(output))}'
        if socket is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdproxy-"))
            socket = Path(folder) / "socket"
        endpoint = listen_unix(socket)
        stack.callback(endpoint.close)
        setting = Setting(endpoint, command=command)

        @asynccontextmanager
        async def opened(power: Power) -> AsyncIterator[Export]:
            export = Export(
                "",
                OverlayDisk(disk),
                loader.load("passthrough").policy,
                description=f"state {chosen} of {run}",
                power=power,
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
    raise typer.Exit(outcome.exit_code)


def _write(disk: CrashDisk, output: Path) -> None:
    """Write a disk to a new sparse file, under a temporary name until it is whole."""
    try:
        fd, name = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None
    os.close(fd)
    partial = Path(name)
    try:
        with err.status(f"writing {output}"):
            write_sparse(disk, partial)
        partial.replace(output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)

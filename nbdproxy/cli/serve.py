"""`nbdproxy serve`: stand between QEMU and a disk."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.cli.console import err, out, plural, set_up_logging, size_text
from nbdproxy.errors import UsageError
from nbdproxy.policy import loader
from nbdproxy.server.assemble import Plan, assemble, finish, is_qcow2
from nbdproxy.server.endpoints import Endpoint, listen_tcp, listen_unix
from nbdproxy.server.export import Export
from nbdproxy.server.service import Run
from nbdproxy.server.service import serve as serve_export


class ImageFormat(StrEnum):
    """How the bytes of an image are taken."""

    RAW = "raw"


def serve(
    image: Annotated[Path, typer.Argument(help="A raw image file or a block device.")],
    socket: Annotated[
        Path | None,
        typer.Option(help="Listen on this Unix socket.", show_default="one in a new folder"),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Listen on TCP, loopback only.")
    ] = None,
    export: Annotated[str, typer.Option(help="The export's name.")] = "",
    image_format: Annotated[
        ImageFormat | None,
        typer.Option("--format", help="raw: serve the file's bytes, even if it is a qcow2."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every write.")] = False,
    policy: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="What goes wrong, and when.")
    ] = "passthrough",
    record: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Record all that passes to a new folder.")
    ] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Never write the image.")] = False,
    qmp: Annotated[
        Path | None,
        typer.Option(metavar="SOCKET", help="QEMU's QMP socket, which may appear later."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Serve while this shell command runs."),
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more.")] = False,
) -> None:
    """Serve a disk over NBD, record it, and let a policy break it.

    Prints the NBD URI on stdout when ready, and on stderr what to paste into QEMU's command line.
    With --run, the command gets $uri, $socket and $export, stdout is the command's, and the exit
    code is its own. SIGINT and SIGTERM end in order; a second one ends at once.

    Examples:

      nbdproxy serve disk.img --record run1

      nbdproxy serve disk.img --policy drop-unflushed --socket /tmp/disk.sock

      nbdproxy serve disk.img --overlay --run 'qemu-img info "$uri"'

      nbdproxy serve disk.img --policy cut-at-shutdown --qmp /tmp/qmp.sock --record run2
    """
    set_up_logging(verbose=verbose)
    if "://" in str(image) or str(image).startswith(("nbd:/", "nbds:/", "nbd+unix:/")):
        raise UsageError("an NBD server cannot be the image yet; name a raw file or block device")
    if socket is not None and listen is not None:
        raise UsageError("--socket and --listen exclude each other; choose one")
    if read_only and overlay:
        raise UsageError("--read-only and --overlay exclude each other; choose one")
    plan = Plan(
        image,
        loader.load(policy).policy,
        name=export,
        raw=image_format is ImageFormat.RAW,
        read_only=read_only,
        overlay=overlay,
        record=record,
    )
    with ExitStack() as stack:
        endpoint = _endpoint(socket, listen, stack)
        served = assemble(plan)
        reason = "nbdproxy failed"
        try:
            outcome = serve_export(
                served,
                endpoint,
                run=Run(run) if run is not None else None,
                qmp=qmp,
                on_ready=lambda: _announce(plan, endpoint, served, qmp, quiet=run is not None),
            )
            reason = outcome.reason
        finally:
            finish(plan, served, reason)
    _summarize(plan, served, outcome.reason)
    raise typer.Exit(outcome.exit_code)


def _endpoint(socket: Path | None, listen: str | None, stack: ExitStack) -> Endpoint:
    if listen is not None:
        endpoint = listen_tcp(listen)
    else:
        if socket is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdproxy-"))
            socket = Path(folder) / "socket"
        endpoint = listen_unix(socket)
    stack.callback(endpoint.close)
    return endpoint


def _announce(
    plan: Plan, endpoint: Endpoint, export: Export, qmp: Path | None, *, quiet: bool
) -> None:
    uri = endpoint.uri(plan.name)
    size, name = size_text(export.info.size), plan.policy.name
    err.print(f"serving {plan.image} ({size}), policy {name}", markup=False)
    if plan.record is not None:
        err.print(f"recording to {plan.record}", markup=False)
    if quiet:
        return
    out.print(uri, markup=False)
    out.file.flush()
    disk_format = "qcow2" if is_qcow2(plan.image) else "raw"
    drive = f"if=virtio,format={disk_format},cache=none,discard=unmap,file={uri}"
    monitor = "" if qmp is None else f" -qmp unix:{qmp},server=on,wait=off"
    err.print(f"attach QEMU with: -drive '{drive}'{monitor}", markup=False)


def _summarize(plan: Plan, export: Export, reason: str) -> None:
    counted = export.counters
    text = (
        f"{reason}: {plural(counted.writes, 'write')} ({size_text(counted.written)}), "
        f"{plural(counted.flushes, 'flush')}, {plural(counted.reads, 'read')}"
    )
    err.print(text, markup=False)
    if export.fenced:
        lost = size_text(export.held_at_cut)
        err.print(f"power cut: {lost} that no flush had covered are gone from {plan.image}")
    if plan.record is not None:
        err.print(f"look at it with: nbdproxy info {plan.record}", markup=False)

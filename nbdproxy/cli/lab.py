"""`nbdproxy lab`: throw-away QEMU guests that run a workload on a disk."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.cli.console import err, out, print_json
from nbdproxy.errors import UsageError
from nbdproxy.lab import run as guest
from nbdproxy.lab import sqlite_image
from nbdproxy.lab.guest.build import Lab, build_lab
from nbdproxy.lab.guest.disk import FILESYSTEMS, PARTITION_TABLES, format_disk
from nbdproxy.lab.workloads import renames
from nbdproxy.lab.workloads.marks import Marker
from nbdproxy.lab.workloads.workloads import WORKLOADS, parse_ending, shell, workload_named
from nbdproxy.oracles.manifest import dump
from nbdproxy.persistence.modes import CacheMode
from nbdproxy.sizes import parse_size

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


_RENAMES = {"rename-new": renames.new_manifest, "rename-old": renames.old_manifest}


def _listed(manifests: Iterable[str]) -> str:
    return ", ".join([*manifests, *_RENAMES])


def _tell(line: str) -> None:
    err.print(line, markup=False)


def _built() -> Lab:
    """Return the lab, telling what is built, which takes long the first time."""
    with err.status("lab: looking for what is built") as status:

        def tell(line: str) -> None:
            _tell(line)
            status.update(line)

        return build_lab(progress=tell)


@app.callback()
def lab() -> None:
    """Run a workload in a throw-away QEMU guest that boots in seconds, on any disk.

    Needs no root. The guest is built once, from Debian's kernel and npm's registry, and cached.

    Example: nbdproxy lab format disk.img && nbdproxy lab run npm-small disk.img
    """


@app.command("list")
def list_workloads(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the workloads there are.

    Example: nbdproxy lab list
    """
    if json:
        print_json([{"name": w.name, "summary": w.summary} for w in WORKLOADS.values()])
        return
    for workload in WORKLOADS.values():
        out.print(f"{workload.name:<20} {workload.summary}", markup=False)


@app.command()
def build() -> None:
    """Build the guest, if that was not done before: a minute or two, then it is cached.

    Example: nbdproxy lab build
    """
    made = _built()
    err.print(f"the lab is in {made.cache}", markup=False)


@app.command("format")
def format_(
    disk: Annotated[Path, typer.Argument(help="The image to make; what it held is lost.")],
    size: Annotated[str, typer.Option(help="Its size.")] = "256M",
    fs: Annotated[str, typer.Option(help=f"One of {', '.join(FILESYSTEMS)}.")] = "ext4",
    table: Annotated[
        str | None, typer.Option(help=f"Partition table: {', '.join(PARTITION_TABLES)} or none.")
    ] = None,
) -> None:
    """Make a raw image with an empty filesystem, for a workload to fill.

    Example: nbdproxy lab format disk.img --size 512M --table gpt
    """
    count = parse_size(size)
    if count is None or count <= 0:
        raise UsageError(f"--size: {size!r} is not a size; write for example 256M")
    format_disk(disk, count, fs=fs, partition_table=table)


@app.command()
def manifest(
    project: Annotated[
        str, typer.Argument(help="A project, small or medium; or rename-new or rename-old.")
    ],
) -> None:
    """Print what a whole npm install of a project leaves, as a manifest.

    rename-new and rename-old are the files of the workload rename, as meant and as before.

    Example: nbdproxy lab manifest small > npm.sha256
    """
    if project in _RENAMES:
        sys.stdout.write(dump(_RENAMES[project]()))
        return
    manifests = _built().manifests
    if project not in manifests:
        raise UsageError(f"there is no project {project}; choose from {_listed(manifests)}")
    sys.stdout.buffer.write(manifests[project].read_bytes())


@app.command("check-sqlite")
def check_sqlite(
    image: Annotated[Path, typer.Argument(help="A bare ext4 image; it is written to.")],
    committed: Annotated[
        str, typer.Option(metavar="N", help="The last transaction told; or a mark committed-N.")
    ] = "0",
    may_lose: Annotated[
        int, typer.Option(min=0, metavar="K", help="How many of the last ones may be gone.")
    ] = 0,
) -> None:
    """Check the database that a workload sqlite-... left, without a guest.

    Replays the filesystem's journal in IMAGE, which writes to it, and recovers a copy of the
    database. Exit code 0: sound, nothing lost; 1: damaged or lost; 2: unusable; 3: the journal is
    damaged, ask a kernel. For many images, python -m nbdproxy.lab.sqlite_image starts faster.

    Example: nbdproxy lab check-sqlite state.img --committed 12 --may-lose 1
    """
    try:
        last = sqlite_image.transaction(committed)
    except ValueError:
        raise UsageError(f"--committed: {committed!r} is neither a number nor a mark") from None
    code, said = sqlite_image.judge(image, committed=last, may_lose=may_lose)
    for line in said:
        out.print(line, markup=False)
    raise typer.Exit(code)


@app.command()
def run(
    workload: Annotated[str, typer.Argument(help="See nbdproxy lab list; or - with --script.")],
    disk: Annotated[str, typer.Argument(help="An image file or an NBD URI.")],
    end: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="cut, sync, umount, hang, or wait:SECONDS[,HOW].",
            show_default="the workload's own",
        ),
    ] = None,
    script: Annotated[
        str | None, typer.Option(metavar="SHELL", help="Run this instead of a workload.")
    ] = None,
    mount: Annotated[
        str | None,
        typer.Option(metavar="OPTIONS", help="Mount options.", show_default="the workload's own"),
    ] = None,
    fs: Annotated[
        str | None,
        typer.Option(help=f"What the disk holds: {', '.join(FILESYSTEMS)}.", show_default="ext4"),
    ] = None,
    cache: Annotated[CacheMode, typer.Option(help="QEMU's cache mode.")] = CacheMode.NONE,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(guest.DEVICES)}.")] = "virtio-blk",
    connections: Annotated[
        int, typer.Option(min=1, max=16, help="With --device nbd: connections, and CPUs for them.")
    ] = 1,
    partition: Annotated[int | None, typer.Option(help="Use this partition.")] = None,
    image_format: Annotated[str, typer.Option("--format", help="raw or qcow2.")] = "raw",
    qmp: Annotated[
        Path | None, typer.Option(metavar="SOCKET", help="Where QEMU shall offer QMP.")
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            metavar="SOCKET", help="Mark the guest's `committed N`, `mark NAME` in the recording."
        ),
    ] = None,
    write_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Let the guest's kernel log its writes, too."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            help="Give the guest up then.",
            show_default="when it hangs",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show all that the guest prints.")
    ] = False,
) -> None:
    """Boot a guest, run a workload on a disk, and end as told.

    Endings: cut powers off without writing anything back; sync and umount do that first; hang lets
    the host kill QEMU; wait:SECONDS idles before.

    A guest that is slow is waited for. It is given up when it hangs: when for five minutes it
    prints nothing and does nothing, or prints nothing in half an hour of the processor's time.

    With --control, the socket of nbdproxy serve --control, each line `committed N` or `mark NAME`
    that the guest prints becomes a mark, committed-N or NAME, for --at mark:NAME. A mark comes
    after its line: what the guest promised by it had been promised.

    With --write-log, dm-log-writes in the guest writes FILE in its own format; what FILE held is
    lost.

    Examples:

      nbdproxy lab run npm-small disk.img --end sync

      nbdproxy serve disk.img --record run1 --run 'nbdproxy lab run npm-small "$uri" --end cut'

      nbdproxy lab run - disk.img --script 'echo hello > a; sync' --end cut

      nbdproxy lab format x.img --size 512M --fs xfs && nbdproxy lab run npm-small x.img --fs xfs

      nbdproxy lab run sqlite-full nbd://127.0.0.1:10809/ --control ctl.sock

      nbdproxy lab run stress nbd://127.0.0.1:10809/ --device nbd --connections 4
    """
    if workload == "-" and script is None:
        raise UsageError("- stands for a script; give it with --script 'SHELL'")
    chosen = shell(script) if script is not None else workload_named(workload)
    if mount is not None:
        chosen = replace(chosen, mount_options=mount)
    if fs is not None:
        if fs not in FILESYSTEMS:
            raise UsageError(f"--fs: {fs!r} is unknown; choose from {', '.join(FILESYSTEMS)}")
        chosen = replace(chosen, fs=fs)
    made = _built()
    ending = parse_ending(end) if end is not None else None
    _tell(f"guest: booting, then {chosen.summary}")
    with (
        contextlib.nullcontext() if control is None else Marker(control) as marker,
        err.status("guest is running") as status,
    ):

        def show(line: str) -> None:
            if marker is not None:
                marker(line)
            status.update(f"guest: {line[:100]}")
            if verbose:
                _tell(f"guest: {line}")

        result = guest.run(
            made,
            chosen,
            disk,
            ending=ending,
            cache_mode=cache.value,
            device=device,
            connections=connections,
            cpus=max(2, connections),
            partition=partition,
            image_format=image_format,
            qmp=qmp,
            write_log=write_log,
            time_limit_s=time_limit,
            on_line=show,
        )
    if marker is not None:
        _tell(marker.trouble or f"guest: {marker.marked} marks are in the recording")
    _tell(
        f"guest: booted in {result.started_s:.1f} s, worked {result.workload_s:.1f} s, "
        f"gone after {result.ended_s:.1f} s"
    )

"""`nbdproxy serve`: stand between QEMU and a disk."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nbdproxy.cli.console import err, out, set_up_logging
from nbdproxy.disks.formats import ImageFormat, format_of_file
from nbdproxy.disks.scratch import temporary_folder
from nbdproxy.errors import UsageError
from nbdproxy.machine import make_room_for_exports
from nbdproxy.nbd.constants import MAX_STRING, TlsMode, TransmissionFlag
from nbdproxy.nbd.uri import is_uri, parse
from nbdproxy.peers import TrustedPeers, user_number
from nbdproxy.policy.compose import load_all
from nbdproxy.server.assemble import ExportPlan, opened
from nbdproxy.server.export.export import Export
from nbdproxy.server.front.endpoints import Endpoint, is_loopback, listen_tcp, listen_unix
from nbdproxy.server.service import Setting
from nbdproxy.server.service import serve as serve_exports
from nbdproxy.server.shared.tls import ServerTls, server_tls
from nbdproxy.sizes import plural, size_text


class Tls(StrEnum):
    """Whether clients may, or must, use TLS."""

    OFF = "off"
    ALLOW = "allow"
    REQUIRE = "require"


def serve(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="A raw image file, a block device, an image of another format (qcow2, VMDK, VDI, "
            "VHDX, ...) or an NBD URI; several are several exports.",
        ),
    ],
    socket: Annotated[
        Path | None,
        typer.Option(help="Listen on this Unix socket.", show_default="one in a new folder"),
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Listen on TCP.")] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Let anybody who reaches --listen in: without TLS, or without a certificate.",
        ),
    ] = False,
    tls: Annotated[Tls, typer.Option(help="Whether clients may, or must, use TLS.")] = Tls.OFF,
    tls_certificates: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="server-cert.pem, server-key.pem and ca-cert.pem."),
    ] = None,
    tls_verify_peer: Annotated[
        bool, typer.Option("--tls-verify-peer", help="Ask clients for a certificate of our CA.")
    ] = False,
    export: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The export's name; once for each image.",
            show_default="empty, or the files' names",
        ),
    ] = None,
    image_format: Annotated[
        ImageFormat | None,
        typer.Option(
            "--format",
            help="raw: serve the file's bytes, even if it is a qcow2; qcow2, vmdk, ...: the disk "
            "in it, as QEMU reads it.",
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every write.")] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What goes wrong, and when: see nbdproxy policy list; several work together.",
            show_default="passthrough",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set a parameter of a policy, or POLICY.KEY=VALUE."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="What policies draw lots with.")] = 0,
    bake: Annotated[
        bool,
        typer.Option("--bake", help="At the end, write the faults that reads show to the image."),
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Record all that passes to a new folder; several images, to folders in it.",
        ),
    ] = None,
    sync_recording: Annotated[
        bool,
        typer.Option(
            "--sync-recording",
            help="Answer a flush only when the recording of it would survive a power loss of this "
            "machine.",
        ),
    ] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Never write the image.")] = False,
    qmp: Annotated[
        Path | None,
        typer.Option(metavar="SOCKET", help="QEMU's QMP socket, which may appear later."),
    ] = None,
    qmp_user: Annotated[
        str | None,
        typer.Option(
            metavar="USER",
            help="Believe the monitor if this user's QEMU listens there, as libvirt-qemu.",
            show_default="your own, or root's",
        ),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(metavar="SOCKET", help="Take commands here: see nbdproxy ctl."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Serve while this shell command runs."),
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more.")] = False,
) -> None:
    """Serve disks over NBD, record them, and let a policy break them.

    Prints the NBD URI on stdout when ready, and on stderr what to paste into QEMU's command line.
    With --run, the command gets $uri, $socket and $export (of the first image), stdout is the
    command's, and the exit code is its own. SIGINT, SIGTERM and SIGHUP end in order, the command
    and all its children too; a second one ends at once. Sockets belong in a folder of your own, as
    vm after mkdir -m 700 vm: in /tmp anybody may bind one first.

    Examples:

      nbdproxy serve disk.img --record run1

      nbdproxy serve disk.img --policy drop-unflushed --socket vm/disk.sock

      nbdproxy serve disk.img --overlay --run 'qemu-img info "$uri"'

      nbdproxy serve disk.img --policy cut-at-shutdown --qmp vm/qmp.sock --record run2

      nbdproxy serve disk.img --policy slow-disk --policy bad-sectors --set delay_s=0.5

      nbdproxy serve disk.img --policy drop-unflushed --control vm/ctl.sock

      nbdproxy serve disk.qcow2 --format qcow2 --record run3

      nbdproxy serve 'nbd+unix:///?socket=vm/qemu-nbd.sock' --socket vm/proxy.sock

      nbdproxy serve root.img data.img --export root --export data

      nbdproxy serve disk.img --listen 0.0.0.0:10809 --tls require --tls-certificates pki \\
          --tls-verify-peer
    """
    set_up_logging(verbose=verbose)
    if socket is not None and listen is not None:
        raise UsageError("--socket and --listen exclude each other; choose one")
    if read_only and overlay:
        raise UsageError("--read-only and --overlay exclude each other; choose one")
    for image in images:
        if "://" in image and not is_uri(image):
            raise UsageError(
                f"{image} is not an NBD URI; those begin with nbd://, nbds://, "
                "nbd+unix:// or nbds+unix://"
            )
    if sync_recording and record is None:
        raise UsageError("--sync-recording is about a recording; add --record DIR, or drop it")
    names = _names(images, export or [])
    policies = load_all(policy or (), settings or ())
    if bake and (read_only or overlay):
        raise UsageError("--bake writes to the image, which --read-only and --overlay forbid")
    plans = [
        ExportPlan(
            image,
            policies,
            name,
            image_format,
            read_only,
            overlay,
            record=_folder(record, name, alone=len(images) == 1),
            sync_recording=sync_recording,
            seed=seed,
            bake=bake,
        )
        for image, name in zip(images, names, strict=True)
    ]
    make_room_for_exports(len(plans))
    security = server_tls(TlsMode[tls.name], tls_certificates, verify_peer=tls_verify_peer)
    with ExitStack() as stack:
        endpoint = _endpoint(
            socket, listen, security, stack, insecure=insecure, read_only=read_only
        )
        taken = None if control is None else listen_unix(control, option="--control")
        if taken is not None:
            stack.callback(taken.close)
        setting = Setting(endpoint, security, run, qmp, _believed(qmp, qmp_user), taken)
        served: list[Export] = []

        def announce(exports: Sequence[Export]) -> None:
            served.extend(exports)
            _announce(plans, exports, setting)

        outcome = serve_exports(
            [partial(opened, plan) for plan in plans], setting, on_ready=announce
        )
    for plan, one in zip(plans, served, strict=False):  # none if it was ended before
        reason = outcome.reason if len(plans) == 1 else f"{plan.image}: {outcome.reason}"
        _summarize(plan, one, reason)
    raise typer.Exit(outcome.exit_code)


def _names(images: Sequence[str], given: Sequence[str]) -> Sequence[str]:
    """Return the exports' names: as given, or the files' where there are several."""
    if given and len(given) != len(images):
        raise UsageError(
            f"{plural(len(images), 'image')} and {plural(len(given), 'name')} do not match: "
            "give --export once for each image, in their order"
        )
    names = given or ([""] if len(images) == 1 else [_own_name(image) for image in images])
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(
            f"two exports would be called {twice[0]!r}; name them with --export, once for each"
        )
    if any(
        "\0" in name or len(name.encode(errors="surrogateescape")) > MAX_STRING for name in names
    ):
        raise UsageError(f"an export's name has at most {MAX_STRING} bytes, none of them 0")
    return names


def _own_name(image: str) -> str:
    return parse(image).export if is_uri(image) else Path(image).name


def _folder(record: Path | None, name: str, *, alone: bool) -> Path | None:
    """Return where an export is recorded: a folder in the one named, if there are several."""
    if record is None or alone:
        return record
    if "/" in name or name in {"", ".", ".."}:
        raise UsageError(f"a recording's folder cannot be called {name!r}; choose another --export")
    return record / name


def _endpoint(
    socket: Path | None,
    listen: str | None,
    tls: ServerTls,
    stack: ExitStack,
    *,
    insecure: bool,
    read_only: bool,
) -> Endpoint:
    if listen is not None:
        private = tls.mode is TlsMode.REQUIRE
        if private and not (tls.knows_clients or read_only or insecure or _is_here(listen)):
            raise UsageError(
                f"anybody who reaches {listen} could write to the disk, as no certificate is asked "
                "for: add --tls-verify-peer, or --read-only, or --insecure if that is what you want"
            )
        endpoint = listen_tcp(listen, anywhere=private or insecure)
        if not (private and tls.knows_clients) and not is_loopback(endpoint.host):
            can = "read the disk" if read_only else "read and write the disk"
            spy = "" if private else ", and listen in"
            lacks = "--tls-verify-peer" if private else "--tls require --tls-verify-peer"
            err.print(
                f"warning: anybody who reaches {listen} can {can}{spy}; {lacks} keeps out "
                "whoever has no certificate of your CA"
            )
    else:
        if socket is None:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=temporary_folder())
            )
            socket = Path(folder) / "socket"
        endpoint = listen_unix(socket)
    stack.callback(endpoint.close)
    return endpoint


def _is_here(listen: str) -> bool:
    return is_loopback(listen.rpartition(":")[0].strip("[]") or "localhost")


def _believed(qmp: Path | None, user: str | None) -> TrustedPeers:
    """Return whose monitor is believed; UsageError if that makes no sense."""
    if user is not None and qmp is None:
        raise UsageError("--qmp-user is for --qmp SOCKET; add that, or drop it")
    advice = "use a socket in a folder of your own, or say --qmp-user USER if that QEMU is meant"
    return TrustedPeers(None if user is None else user_number(user), advice)


def _announce(plans: Sequence[ExportPlan], exports: Sequence[Export], setting: Setting) -> None:
    for plan, export in zip(plans, exports, strict=True):
        size, name = size_text(export.info.size), plan.policy.name
        err.print(f"serving {plan.image} ({size}), policy {name}", markup=False)
        if plan.record is not None:
            err.print(f"recording to {plan.record}", markup=False)
        if setting.command is not None:
            continue
        uri = setting.uri(export)
        out.print(uri, markup=False)
        out.file.flush()
        found = format_of_file(Path(plan.image)) if plan.kind == "raw" else None
        below = found not in {None, ImageFormat.LUKS}
        monitor = "" if setting.qmp is None else f" -qmp unix:{setting.qmp},server=on,wait=off"
        attach = _drive(setting, export, str(found) if below else "raw")
        err.print(f"attach QEMU with: {attach}{monitor}", markup=False)


def _drive(setting: Setting, export: Export, disk_format: str) -> str:
    """Return QEMU's options for a disk; its URIs have no TLS, so that takes a longer form."""
    cannot_write = export.info.flags & TransmissionFlag.READ_ONLY
    read_only = ",readonly=on" if cannot_write else ""
    if setting.tls.mode is not TlsMode.REQUIRE:
        drive = f"if=virtio,format={disk_format},cache=none,discard=unmap{read_only}"
        return f"-drive '{drive},file={_in_option(setting.uri(export))}'"
    where = setting.endpoint
    server = f"file.server.type=inet,file.server.host={where.host},file.server.port={where.port}"
    if where.path is not None:
        server = f"file.server.type=unix,file.server.path={_in_option(where.path)}"
        server += ",file.tls-hostname=localhost"
    node = f"driver={disk_format},node-name=d0,file.driver=nbd,{server},file.tls-creds=tls0"
    name = f",file.export={_in_option(export.info.name)}" if export.info.name else ""
    name += ",read-only=on" if cannot_write else ""
    return (
        "-object tls-creds-x509,id=tls0,endpoint=client,dir=CERTIFICATES "
        f"-blockdev '{node}{name},cache.direct=on,discard=unmap' -device virtio-blk-pci,drive=d0"
    )


def _in_option(value: object) -> str:
    """Return a value as it stands in an option of QEMU."""
    return str(value).replace(",", ",,")


def _summarize(plan: ExportPlan, export: Export, reason: str) -> None:
    counted = export.counters
    text = (
        f"{reason}: {plural(counted.writes, 'write')} ({size_text(counted.written)}), "
        f"{plural(counted.flushes, 'flush')}, {plural(counted.reads, 'read')}"
    )
    err.print(text, markup=False)
    if export.power.off:
        lost = size_text(export.held_at_cut)
        err.print(f"power cut: {lost} that no flush had covered are gone from {plan.image}")
    if plan.record is not None:
        err.print(f"look at it with: nbdproxy info {plan.record}", markup=False)

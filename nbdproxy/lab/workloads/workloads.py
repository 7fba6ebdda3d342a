"""What a guest does to the target disk, and how it ends: data, and the shell script made of it.

Guarantees: a workload is a value; the ones that come with the lab are in `WORKLOADS`, by name.
The script runs in the guest as root in busybox's shell, inside the mounted target disk.
Does not cover what happens on the host (that is `guest`).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from nbdproxy.errors import LabError
from nbdproxy.lab.guest.initramfs import MARK
from nbdproxy.lab.guest.kernel import FILESYSTEM_MODULES, MOUNT_PROGRAMS
from nbdproxy.lab.guest.userland import APP, NPM_FLAGS
from nbdproxy.lab.workloads import databases, fsyncs, renames, stress

TARGET = "/mnt"
"""Where the guest mounts the target disk."""

TOOLS = "/tools"


class End(Enum):
    """How a run ends, once its workload is done."""

    CUT = "cut"
    """The guest powers off without writing anything back; QEMU ends in order."""
    SYNC = "sync"
    """The same, behind a `sync`."""
    UMOUNT = "umount"
    """The same, behind unmounting the target disk."""
    HANG = "hang"
    """The guest does nothing more, and the host kills QEMU (SIGKILL)."""


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ends, after idling `wait_s` seconds (the kernel writes back on its own)."""

    how: End = End.CUT
    wait_s: float = 0


def parse_ending(text: str) -> RunEnd:
    """Read `cut`, `sync`, `umount`, `hang`, or `wait:SECONDS` with `,HOW` behind it or not."""
    how, wait_s = text, 0.0
    try:
        if text.startswith("wait:"):
            seconds, _, how = text.removeprefix("wait:").partition(",")
            how, wait_s = how or End.CUT.value, float(seconds)
        ending = RunEnd(End(how), wait_s)
    except ValueError:
        raise LabError(
            f"no such ending: {text!r}; use cut, sync, umount, hang, wait:SECONDS "
            "or wait:SECONDS,hang"
        ) from None
    if not 0 <= wait_s <= 3600:
        raise LabError(f"a wait is between 0 and 3600 seconds, not {wait_s:g}")
    return ending


@dataclass(frozen=True, slots=True)
class Workload:
    """What to run on which filesystem, and how a run of it ends unless told otherwise.

    `script` is shell; `project` is what it installs, if any; the disk wants `disk_mib` MiB.
    Unless it `needs_mount`, the script runs even if the disk cannot be mounted, and sees to that.
    """

    name: str
    summary: str
    script: str
    project: str | None = None
    fs: str = "ext4"
    mount_options: str = "defaults"
    disk_mib: int = 256
    ending: RunEnd = RunEnd()
    needs_mount: bool = True


def npm(project: str) -> Workload:
    """A real `npm ci` of a project into `/app`, offline, from the cache on the tools disk."""
    home, app = f"{TOOLS}/projects/{project}", f"{TARGET}/{APP}"
    script = (
        f"mkdir {app} && cp {home}/package.json {home}/package-lock.json {app}/ && cd {app} && "
        f"{TOOLS}/bin/node {TOOLS}/npm/bin/npm-cli.js ci --offline --cache {home}/cache "
        f"{' '.join(NPM_FLAGS)}"
    )
    return Workload(f"npm-{project}", f"npm ci of project {project}", script, project)


def tar(project: str) -> Workload:
    """The same files as `npm` leaves, unpacked by tar: a few seconds instead of many."""
    script = f"tar -x -f {TOOLS}/projects/{project}/tree.tar -C {TARGET}"
    return Workload(f"tar-{project}", f"the files of project {project}, by tar", script, project)


def shell(script: str, *, name: str = "shell") -> Workload:
    """Any shell script; its working directory is the top of the target disk."""
    return Workload(name, "a shell script", script)


def sqlite(
    *, synchronous: str = "full", journal: str = "delete", transactions: int = 50
) -> Workload:
    """Transactions committed to `/db/test.db`, one after the other, each told when it is through.

    `databases.committed` reads which. Only extra, and full with the journal wal, promise that a
    transaction is durable then: with a rollback journal, full leaves the last one to be undone.
    """
    script = databases.commit_script(
        synchronous=synchronous, journal=journal, transactions=transactions
    )
    name = synchronous if journal == "delete" else f"{journal}-{synchronous}"
    summary = f"SQLite commits {transactions} times (journal {journal}, synchronous {synchronous})"
    return Workload(f"sqlite-{name}", summary, script, disk_mib=64)


def sqlite_check() -> Workload:
    """The database that `sqlite` left, recovered and checked; `databases.checked` reads it.

    It ends well whatever it finds, even a disk that cannot be mounted. It writes to the disk: the
    mount replays the filesystem's journal, and SQLite its own.
    """
    summary = "what is left of the database of another run"
    script = databases.check_script()
    return Workload("sqlite-check", summary, script, disk_mib=64, needs_mount=False)


def fsync_probe(*, call: str = "fsync", attempts: int = 6) -> Workload:
    """Writes and calls of fsync or fdatasync, each with what came of it; `fsyncs.probed` reads it.

    On ext4 a call that has metadata to write, fsync after any write and the first fdatasync, has
    its flushes from the journal: one that fails ends all writing. Any other call flushes for
    itself: a failure is told once, and ext4 goes on.
    """
    summary = f"what {call} says to an application, {attempts} times"
    script = fsyncs.probe_script(call=call, attempts=attempts)
    return Workload(f"{call}-probe", summary, script, disk_mib=64)


def rename(*, auto_da_alloc: bool = False) -> Workload:
    """Files replaced by rename without fsync, cut when the journal has committed and no data went.

    `renames.new_manifest` and `old_manifest` say what there should be. With `auto_da_alloc`, ext4's
    default, the data goes with the commit.
    """
    option = "auto_da_alloc" if auto_da_alloc else "noauto_da_alloc"
    return Workload(
        "rename-auto-da-alloc" if auto_da_alloc else "rename",
        f"{renames.FILES} files replaced by rename without fsync, on ext4 with {option}",
        renames.script(),
        mount_options=f"{option},commit=1",
        disk_mib=64,
        ending=RunEnd(End.CUT, wait_s=3),
    )


def with_zeroes(workload: Workload) -> Workload:
    """The same where ext4 may commit a file before its data, so that a cut leaves it all zero.

    Each second the journal commits the files' sizes and blocks, while their data stays in the
    guest's page cache for up to 30 s: it is never sent, and every flush is honoured.
    """
    return replace(
        workload,
        name=f"{workload.name}-zeroes",
        summary=f"{workload.summary}, on an ext4 that commits files before their data",
        mount_options="nodelalloc,data=writeback,commit=1",
        ending=RunEnd(End.CUT, wait_s=3),
    )


def _shipped() -> dict[str, Workload]:
    few = "i=0; while [ $i -lt 200 ]; do echo file number $i > f$i; i=$((i+1)); done"
    listed = [
        npm("small"),
        replace(npm("medium"), disk_mib=512),
        tar("small"),
        replace(tar("medium"), disk_mib=512),
        with_zeroes(npm("small")),
        with_zeroes(tar("small")),
        replace(shell(few, name="files-200"), summary="200 small files", disk_mib=64),
        Workload(
            "stress",
            "four processes that change files at once, all of which are then checked",
            stress.script(),
            disk_mib=128,
            ending=RunEnd(End.UMOUNT),
        ),
        *(sqlite(synchronous=level) for level in ("full", "extra", "normal", "off")),
        *(sqlite(synchronous=level, journal="wal") for level in ("full", "normal")),
        sqlite_check(),
        *(rename(auto_da_alloc=helped) for helped in (False, True)),
        *(fsync_probe(call=call) for call in fsyncs.CALLS),
    ]
    return {workload.name: workload for workload in listed}


WORKLOADS = _shipped()
"""The workloads that `nbdproxy lab run NAME` offers."""


def workload_named(name: str) -> Workload:
    """Return a shipped workload; `LabError` lists them if there is none of that name."""
    try:
        return WORKLOADS[name]
    except KeyError:
        raise LabError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}") from None


def render(
    workload: Workload,
    ending: RunEnd,
    target: str,
    tools_disk: str,
    *,
    attach: Sequence[str] = (),
    settle: Sequence[str] = (),
    detach: Sequence[str] = (),
) -> str:
    """Return the script that init runs; `target` and `tools_disk` are the guest's device names.

    `attach` are lines of shell that the target needs before it is there, `detach` those that end
    it in order, behind an unmount, `settle` those that any other ending needs.
    """
    lines = [
        "fail() {",
        f'  echo "{MARK} failed $1"; echo o > /proc/sysrq-trigger; while :; do sleep 60; done',
        "}",
        "wait_for() {",
        "  n=0; until [ -b $1 ]; do n=$((n+1)); [ $n -gt 600 ] && fail $1; sleep 0.1; done",
        "}",
        f"wait_for {tools_disk}",
        f"mount -t ext4 -o ro {tools_disk} {TOOLS} || fail tools-disk",
        *([f"load {workload.fs}"] if workload.fs in FILESYSTEM_MODULES else []),
        *attach,
        f"wait_for {target}",
        _mount(workload, target) + (" || fail mount" if workload.needs_mount else ""),
        f"cd {TARGET}",
        f'echo "{MARK} started"',
        f"sh -c {shlex.quote(workload.script)}",
        f'echo "{MARK} finished $?"',
        "cd /",
    ]
    if ending.wait_s:
        lines.append(f"sleep {ending.wait_s:g}")
    if ending.how is End.SYNC:
        lines.append("sync")
    if ending.how is End.UMOUNT:
        lines += [f"umount {TARGET} || fail umount", *detach]
    else:
        lines += settle
    lines.append(f'echo "{MARK} ending"')
    if ending.how is End.HANG:
        lines.append("while :; do sleep 60; done")
    return "\n".join([*lines, ""])


def _mount(workload: Workload, target: str) -> str:
    options = shlex.quote(workload.mount_options)
    if program := MOUNT_PROGRAMS.get(workload.fs):
        return f"{TOOLS}/bin/{program} -o {options} {target} {TARGET}"
    return f"mount -t {workload.fs} -o {options} {target} {TARGET}"

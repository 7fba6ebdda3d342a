"""Runs one workload in one throw-away guest, from boot to its end.

Guarantees: when `run` returns or raises, QEMU is gone; a guest that hangs, outlives a time limit,
does not mount or whose workload fails raises `LabError` with the end of its serial output. One that
is only slow is waited for: see `accel.Pulse`. The kernel, the initramfs and the tools disk are only
read, so any number of guests may share them.

Does not cover the disk behind the target: hand in an image file or the URI of an NBD server.
Plain blocking code: callers with an event loop run it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbdproxy.errors import LabError
from nbdproxy.lab.guest import accel, cpio, dm_log, initramfs, kernel_client, tools
from nbdproxy.lab.guest.build import Lab
from nbdproxy.lab.guest.cache import silent
from nbdproxy.lab.guest.initramfs import MARK
from nbdproxy.lab.guest.kernel import MOUNT_PROGRAMS
from nbdproxy.lab.workloads.workloads import End, RunEnd, Workload, render

CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")

DEVICES = {
    "virtio-blk": ("/dev/vdb", ("-device", "virtio-blk-pci,drive=target,addr=5")),
    "virtio-scsi": (
        "/dev/sda",
        ("-device", "virtio-scsi-pci,addr=5", "-device", "scsi-hd,drive=target"),
    ),
    "ide": ("/dev/sda", ("-device", "ide-hd,drive=target,bus=ide.0")),
    "nvme": ("/dev/nvme0n1", ("-device", "nvme,drive=target,serial=target,addr=5")),
    "nbd": (kernel_client.DISK, kernel_client.NETWORK),
}
"""How each kind of target disk is attached, and what the guest calls it (the tools are vda).

`nbd` is none of QEMU's disks: the guest's own kernel connects to the server.
"""

# Not only at a line's beginning: a workload's last line may lack its end; and a message of the
# kernel may come before the mark's own end of line.
_MARKED = re.compile(rf"{MARK} (\w+) ?(\S*?)(?:\[ *\d+\.\d+\] .*)?$")
_KERNEL_SAYS = re.compile(r"\[ *\d+\.\d+\] ")
_TOOLS_DEVICE = "/dev/vda"
_TAIL_LINES = 25
_LINE_MAX = 1 << 20
"""Bytes after which what a guest prints is taken for a line, ended or not."""


@dataclass(frozen=True, slots=True)
class GuestRun:
    """What a run was: times in seconds since QEMU started, and all that the guest printed.

    started_s    the workload began
    finished_s   the workload was done
    ended_s      QEMU was gone
    exit_status  QEMU's: 0, or -9 where the ending is `hang`
    """

    started_s: float
    finished_s: float
    ended_s: float
    exit_status: int
    serial: str
    command: tuple[str, ...]

    @property
    def workload_s(self) -> float:
        """How long the workload took."""
        return self.finished_s - self.started_s


def run(
    lab: Lab,
    workload: Workload,
    target: Path | str,
    *,
    ending: RunEnd | None = None,
    cache_mode: str = "writeback",
    device: str = "virtio-blk",
    image_format: str = "raw",
    partition: int | None = None,
    connections: int = 1,
    qmp: Path | None = None,
    write_log: Path | None = None,
    accelerator: str | None = None,
    time_limit_s: float | None = None,
    memory_mib: int = 1024,
    cpus: int = 2,
    extra: Sequence[str] = (),
    on_line: Callable[[str], None] = silent,
) -> GuestRun:
    """Boot a guest with `target` (an image file or an NBD URI), run the workload, end as told.

    Without `ending` the workload's own is taken.
    `connections` are those of the device `nbd`, which needs a URI on 127.0.0.1 and to which
    `cache_mode` and `image_format`, being QEMU's, do not apply.
    `write_log` is the file that the guest's kernel shall log its writes to: see `dm_log`.
    `on_line` gets each line of the serial port as it comes, those with a `MARK` too.
    `qmp` is where QEMU shall listen for its monitor protocol. `accelerator` is kvm or tcg, by
    default what `accel.probe` finds. `extra` goes to QEMU as it is. Without `time_limit_s` only a
    hang ends it.
    """
    if cache_mode not in CACHE_MODES:
        raise LabError(f"no cache mode {cache_mode!r}; QEMU has {', '.join(CACHE_MODES)}")
    if device not in DEVICES:
        raise LabError(f"no device {device!r}; the lab has {', '.join(DEVICES)}")
    if accelerator is None:
        accelerator = accel.probe(lab.cache, lab.kit)
    ending = ending or workload.ending
    if (program := MOUNT_PROGRAMS.get(workload.fs)) not in {None, *lab.programs}:
        raise tools.missing_error([str(program)])
    drive = f"format={image_format},cache={cache_mode},discard=unmap,{_file(target)}"
    stack = _stack(lab, target, device, drive, connections)
    if partition is not None:
        end = f"p{partition}" if stack.name[-1].isdigit() else str(partition)
        stack = replace(stack, name=stack.name + end)
    if write_log is not None:
        stack = _logged(lab, stack, device, write_log)
    script = render(
        workload,
        ending,
        stack.name,
        _TOOLS_DEVICE,
        attach=stack.attach,
        settle=stack.settle,
        detach=stack.detach,
    )
    run_sh = cpio.regular("run.sh", script.encode())
    with initramfs.extended(lab.kit.initrd, [run_sh]) as initrd:
        command = [
            *accel.base_command(
                lab.kit.kernel, initrd, accelerator, memory_mib=memory_mib, cpus=cpus
            ),
            "-drive",
            "if=none,id=tools,format=raw,readonly=on,file.locking=off," + _file(lab.tools_disk),
            "-device", "virtio-blk-pci,drive=tools,addr=4",
            *stack.options,
            *(("-qmp", f"unix:{_escaped(qmp)},server=on,wait=off") if qmp else ()),
            *extra,
        ]  # fmt: skip
        return _Watch(workload, ending, time_limit_s, on_line).follow(command)


@dataclass(frozen=True, slots=True)
class _Stack:
    """What the filesystem lies on: its device's name, QEMU's options, and `render`'s lines."""

    name: str
    options: tuple[str, ...]
    attach: tuple[str, ...] = ()
    settle: tuple[str, ...] = ()
    detach: tuple[str, ...] = ()


def _stack(lab: Lab, target: Path | str, device: str, drive: str, connections: int) -> _Stack:
    """Return the stack of a target alone; `drive` says how QEMU shall open it."""
    name, attachment = DEVICES[device]
    if device != "nbd":
        return _Stack(name, ("-drive", f"if=none,id=target,{drive}", *attachment))
    if "nbd-client" not in lab.programs:
        raise tools.missing_error(["nbd-client"])
    return _Stack(
        name,
        attachment,
        attach=kernel_client.attach(str(target), connections),
        detach=kernel_client.DETACH,
    )


def _logged(lab: Lab, stack: _Stack, device: str, path: Path) -> _Stack:
    """Return the stack with the kernel's log in front; what is on top is taken off first."""
    if "dmsetup" not in lab.programs:
        raise tools.missing_error(["dmsetup"])
    dm_log.prepare(path)
    log = "/dev/vdc" if device == "virtio-blk" else "/dev/vdb"
    return _Stack(
        dm_log.DISK,
        (*stack.options, *dm_log.drive(_file(path))),
        attach=(*stack.attach, *dm_log.attach(stack.name, log)),
        settle=(*stack.settle, *dm_log.settle(log)),
        detach=(*dm_log.DETACH, *stack.detach),
    )


def _file(target: Path | str) -> str:
    """Name an image or an NBD server to QEMU; a path must not be taken for a protocol."""
    if isinstance(target, str) and "://" in target:
        return f"file={_escaped(target)}"
    return f"file.driver=file,file.filename={_escaped(target)}"


def _escaped(path: Path | str) -> str:
    """Write a value for one of QEMU's option lists, where a comma would end it."""
    return str(path).replace(",", ",,")


@dataclass(slots=True)
class _Watch:
    """Follows one guest by its serial port."""

    workload: Workload
    ending: RunEnd
    time_limit_s: float | None
    on_line: Callable[[str], None]
    started_at: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    status: int | None = None

    def follow(self, command: Sequence[str]) -> GuestRun:
        """Run QEMU to its end and judge it."""
        trouble = None
        with accel.running(command) as process:
            pulse = accel.Pulse(process.pid, self.ending.wait_s)
            for line in _lines(process):
                if line is not None:
                    self._take(line)
                    if not _KERNEL_SAYS.match(line):  # it may complain of a hang for ever
                        pulse.beat()
                if self.ending.how is End.HANG and "ending" in self.times:
                    accel.kill(process)
                if trouble := self._trouble(pulse):
                    break
        took = time.monotonic() - self.started_at
        if trouble:
            raise self._error(trouble)
        if "started" not in self.times:
            raise self._error("did not get as far as its workload, check the disk and its options")
        if self.status != 0:
            raise self._error(f"ended its workload with status {self.status}, mend its script")
        if "ending" not in self.times:
            raise self._error("ended before it was told to, run it again")
        return GuestRun(
            started_s=self.times["started"],
            finished_s=self.times["finished"],
            ended_s=took,
            exit_status=process.returncode,
            serial="\n".join(self.lines),
            command=tuple(command),
        )

    def _trouble(self, pulse: accel.Pulse) -> str | None:
        limit = self.time_limit_s
        if limit is not None and time.monotonic() - self.started_at > limit:
            return f"was not done after {limit:g} s, give it longer"
        hang = pulse.trouble()
        return f"hangs ({hang}), check the disk and what serves it" if hang else None

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if found := _MARKED.search(line):
            self.times[found[1]] = time.monotonic() - self.started_at
            if found[1] == "finished" and found[2].isdecimal():
                self.status = int(found[2])
        self.on_line(line)

    def _error(self, what: str) -> LabError:
        tail = "\n".join(f"  {line}" for line in self.lines[-_TAIL_LINES:]) or "  (nothing)"
        return LabError(f"the guest running {self.workload.name} {what}; its last words:\n{tail}")


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """Yield what QEMU prints, line by line, until it has ended; None where a tick passes."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(accel.TICK_S):
                yield None
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            *whole, pending = (pending + data).split(b"\n")
            if len(pending) > _LINE_MAX:
                whole, pending = [*whole, pending], b""
            for line in whole:
                yield line.decode(errors="replace").rstrip("\r")
    if pending:
        yield pending.decode(errors="replace").rstrip("\r")
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(accel.TICK_S)
        yield None

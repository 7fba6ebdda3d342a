"""Every call to the store below may fail, and all ends in order: said, recorded, exit code 2.

strace makes the kernel's calls fail as a dead GlusterFS brick or a broken disk does (`--inject`):
the process that asks is the product as it is.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nbdproxy.recording.index import NEVER
from nbdproxy.recording.meta import Fingerprint
from nbdproxy.recording.reader import Recording
from tests.support import nbd_client as nbd
from tests.support.nbd_client import FLUSH, READ, TRIM, WRITE, ZERO, Op
from tests.support.serving import COMMAND, Server, nbdproxy

MIB = 1 << 20


def failing(fault: str, path: Path) -> tuple[str, ...]:
    """The command with the system calls that fail for one file."""
    calls, error = fault.split(":")
    return traced(path, f"{calls}:error={error}")


def traced(path: Path, *injected: str) -> tuple[str, ...]:
    """The command with what strace(1) is to inject into system calls on one file."""
    calls = ",".join(one.partition(":")[0] for one in injected)
    words = ("-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={calls}")
    options = [word for one in injected for word in ("-e", f"inject={one}")]
    return ("strace", *words, "-P", str(path), *options, *COMMAND)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return path


def check_ended_in_order(run: Path, said: str) -> Recording:
    """The recording has its end, which tells what failed."""
    recording = Recording(run)
    assert recording.missing is None
    assert not recording.truncated
    assert recording.ending is not None
    assert said in recording.ending.reason
    nbdproxy("info", run, code=None)
    return recording


@pytest.mark.parametrize(
    ("fault", "policy", "said"),
    [
        ("close:EBADFD", "passthrough", "could not be closed: File descriptor in bad state"),
        ("close:EIO", "drop-unflushed", "could not be closed: Input/output error"),
        ("fdatasync:EIO", "passthrough", "could not be made durable: Input/output error"),
        ("fdatasync:EDQUOT", "passthrough", "could not be made durable: Disk quota exceeded"),
    ],
)
def test_an_end_that_the_store_refuses_is_recorded_and_said(
    tmp_path: Path, image: Path, fault: str, policy: str, said: str
) -> None:
    run = tmp_path / "run"
    command = failing(fault, image)
    options = ("--record", run, "--policy", policy)
    with Server(image, *options, command=command) as server:
        with server.client() as client:
            assert client.do(Op(WRITE, 0, data=b"x" * 4096))[0].error == 0
        assert server.stop() == 2
        told = server.stderr
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith(f"nbdproxy: {image} {said}; see to the disk")
    recording = check_ended_in_order(run, said)
    table = recording.table
    assert ((table.completed != NEVER) & (table.error == 0)).all()
    recording.close()


@pytest.mark.parametrize(
    ("fault", "what", "expected"),
    [
        ("pwrite64:ENOSPC", Op(WRITE, 0, data=b"x" * 4096), nbd.ENOSPC),
        ("pwrite64:EDQUOT", Op(WRITE, 0, data=b"x" * 4096), nbd.ENOSPC),
        ("pwrite64:ENOTCONN", Op(WRITE, 0, data=b"x" * 4096), nbd.EIO),
        ("fallocate:ENOSPC", Op(ZERO, 0, 4096), nbd.ENOSPC),
        ("fallocate:EBADFD", Op(TRIM, 0, 4096), nbd.EIO),
        ("preadv2:EBADFD", Op(READ, 0, 4096), nbd.EIO),
        ("preadv2,preadv:EIO", Op(WRITE, 0, data=b"x" * 4096), nbd.EIO),
        ("fdatasync:EIO", Op(FLUSH), nbd.EIO),
    ],
)
def test_a_call_that_fails_is_one_requests_failure(
    tmp_path: Path, image: Path, fault: str, what: Op, expected: int
) -> None:
    """The export lives on; what was not done is in the recording as an error."""
    run = tmp_path / "run"
    command = failing(fault, image)
    with Server(image, "--record", run, command=command) as server:
        with server.client() as client:
            assert [client.do(what)[0].error for _ in range(2)] == [expected] * 2
        assert server.stop() == (2 if fault.startswith("fdatasync") else 0)
        assert "Traceback" not in server.stderr
    recording = Recording(run)
    assert recording.missing is None and recording.ending is not None
    table = recording.table
    assert (table.error[table.command == what.command] == expected).all()
    recording.close()


def test_a_flush_that_failed_once_fails_for_good(tmp_path: Path, image: Path) -> None:
    """The kernel says it once, and what it dropped then no later flush makes durable."""
    run = tmp_path / "run"
    once = traced(image, "fdatasync:error=EIO:when=2")
    with Server(image, "--record", run, command=once) as server:
        with server.client() as client:
            write = Op(WRITE, 0, data=b"x" * 4096)
            done = [client.do(one)[0].error for one in (write, Op(FLUSH), write, Op(FLUSH))]
            assert done == [0, 0, 0, nbd.EIO]
            done = [client.do(one)[0].error for one in (write, Op(FLUSH), Op(READ, 0, 512))]
            assert done == [0, nbd.EIO, 0]
        assert server.stop() == 2
        assert f"{image} could not be made durable: Input/output error" in server.stderr
    check_ended_in_order(run, "could not be made durable").close()


def test_a_store_that_fails_every_request_does_not_fill_the_log(
    tmp_path: Path, image: Path
) -> None:
    command = failing("preadv2,preadv:EIO", image)
    with Server(image, "--record", tmp_path / "run", command=command) as server:
        with server.client() as client:
            for _ in range(300):
                assert client.do(Op(WRITE, 0, data=b"x" * 512))[0].error == nbd.EIO
                assert client.do(Op(READ, 0, 512))[0].error == nbd.EIO
        assert server.stop() == 0
        lines = server.stderr.splitlines()
    assert 200 <= sum("[warning" in line for line in lines) < 450
    assert "a before-image cannot be read" in lines[4]


@pytest.mark.parametrize(
    ("fault", "file", "said"),
    [
        ("pwrite64:ENOSPC", "data", "cannot grow: No space left on device; make room"),
        ("pwrite64:EBADFD", "events", "cannot grow: File descriptor in bad state; see to the disk"),
        ("fsync:EIO", "data", "cannot be made durable: Input/output error"),
        ("fsync:EIO", "events", "cannot be made durable: Input/output error"),
        ("close:EIO", "events", ""),
        ("unlinkat:EIO", "", "cannot be made durable: Input/output error"),
    ],
)
def test_a_recordings_store_that_fails_is_said(
    tmp_path: Path, image: Path, fault: str, file: str, said: str
) -> None:
    """In one sentence, with exit code 2 if something of it may be lost; what is there is read."""
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    path = run / file if file else run
    with Server(image, "--record", run, command=failing(fault, path)) as server:
        with server.client() as client:
            assert client.do(Op(WRITE, 0, data=b"x" * 4096))[0].error == 0
        assert server.stop() == (2 if said else 0)
        told = server.stderr
    assert "Traceback" not in told
    assert said in told
    recording = Recording(run)
    assert recording.missing is None
    assert int((recording.table.completed != NEVER).sum()) == 1
    recording.close()


COPY_ON_WRITE = "ioctl:retval=0"
"""Lets the tail's file take the flag that only such filesystems have."""


@pytest.mark.parametrize(("file", "when"), [("data", 8), ("events", 2), ("events", 30)])
def test_a_full_copy_on_write_filesystem_is_an_error_and_no_signal(
    tmp_path: Path, image: Path, file: str, when: int
) -> None:
    """There a page that is written again may find no room, whatever was allocated."""
    run = tmp_path / "run"
    full = f"pwrite64:error=ENOSPC:when={when}+"
    command = traced(run / f"{file}.tail", COPY_ON_WRITE, full)
    if when < 4:  # before the first request
        words = [*command, "serve", str(image), "--record", str(run)]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 2
        assert "cannot grow: No space left on device; make room" in ended.stderr
        assert "Traceback" not in ended.stderr
        return
    with Server(image, "--record", run, "--overlay", command=command) as server:
        client, done = server.client(), 0
        while not (error := client.do(Op(WRITE, 0, data=b"x" * 4096))[0].error):
            done += 1
        assert error == nbd.ENOSPC and done > 0
        assert server.wait() == 2
        assert "cannot grow: No space left on device; make room" in server.stderr
    recording = Recording(run)
    assert int((recording.table.completed != NEVER).sum()) >= done
    recording.verify()
    recording.close()


def test_a_recording_on_a_copy_on_write_filesystem_outlives_a_kill(
    tmp_path: Path, image: Path
) -> None:
    run = tmp_path / "run"
    with Server(
        image, "--record", run, "--overlay", command=traced(run / "data.tail", COPY_ON_WRITE)
    ) as server:
        client = server.client()
        for n in range(300):  # more than the tail holds
            content = bytes([n % 256]) * 65536
            assert client.do(Op(WRITE, n % 16 * 65536, data=content))[0].error == 0
        server.kill()
    nbdproxy("open", run, "--at", "end", "-o", tmp_path / "state")
    expected = b"".join(bytes([n % 256]) * 65536 for n in [*range(288, 300), *range(284, 288)])
    assert (tmp_path / "state").read_bytes() == expected


@pytest.mark.parametrize(
    "fault", ["lseek:EIO", "openat:ESTALE", "openat:EBUSY", "newfstatat:EIO", "fcntl:EIO"]
)
def test_an_image_that_cannot_be_opened_is_said(tmp_path: Path, image: Path, fault: str) -> None:
    command = failing(fault, image)
    words = [*command, "serve", str(image), "--record", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("nbdproxy: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("size", [65536, 256 * 1024])
def test_requests_in_flight_when_the_recording_is_full_are_all_answered(
    tmp_path: Path, size: int
) -> None:
    """Not with a reset, although more has been sent than one look at the socket takes."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    command = ("prlimit", f"--fsize={20 * MIB}", *COMMAND)
    for turn in range(4):
        with Server(
            image, "--record", tmp_path / f"run{turn}", "--overlay", command=command
        ) as server:
            client = server.client()
            errors: set[int] = set()
            while nbd.ENOSPC not in errors:
                ops = [Op(WRITE, n * size, data=bytes([n]) * size) for n in range(16)]
                errors |= {reply.error for reply in client.do(*ops)}
            assert errors <= {0, nbd.ENOSPC}
            assert server.wait() == 2


def test_the_end_is_that_of_the_file_that_was_served(tmp_path: Path, image: Path) -> None:
    """Not of one that came to have its name: what that is was never recorded."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    with Server(image, "--record", run) as server:
        server.client().do(Op(WRITE, 0, data=b"x" * 4096))
        image.rename(moved)
        image.write_bytes(bytes(2 * MIB))
        assert server.stop() == 0
        assert server.stderr.count(f"{image} was moved, replaced or removed while it was") == 1
    recording = Recording(run)
    assert recording.ending is not None
    assert recording.ending.image == Fingerprint.of(moved)
    assert recording.ending.reason.startswith(f"ended by SIGTERM; {image} was moved, replaced")
    recording.close()
    said = nbdproxy("open", run, "--at", "end", "-o", tmp_path / "state", code=2).stderr
    assert str(image) in said
    nbdproxy("open", run, "--at", "end", "--base", moved, "-o", tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == moved.read_bytes()

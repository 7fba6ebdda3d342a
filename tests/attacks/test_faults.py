"""Each call on each file that is written may fail with any error, or be interrupted by a signal.

What a store that fails means for requests and for the end is in test_stores.py (close, fdatasync,
pwrite64, fallocate and preadv2 of the image; pwrite64, fsync, close and unlinkat of the recording);
here are other calls, files and errors: those of the start, of the recording's tail, of the
socket and the log, and of the commands that write a file. strace(1) injects the errors. Not
covered: calls that hang.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdproxy.recording.index import NEVER
from nbdproxy.recording.reader import Recording
from tests.support import nbd_client as nbd
from tests.support.nbd_client import FLUSH, READ, TRIM, WRITE, ZERO, Op
from tests.support.serving import COMMAND, Server, nbdproxy

MIB = 1 << 20


def injected(*faults: str, paths: tuple[Path, ...] = ()) -> tuple[str, ...]:
    """The command, with `CALLS:ERROR[:when=N]` of it failing, on these paths if there are any."""
    words = ["strace", "-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null"]
    for fault in faults:
        calls, _, error = fault.partition(":")
        words += ["-e", f"inject={calls}:error={error}"]
    calls = ",".join(fault.partition(":")[0] for fault in faults)
    words += ["-e", f"trace={calls}"]
    for path in paths:
        words += ["-P", str(path)]
    return (*words, *COMMAND)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * MIB)
    return path


def one_sentence(*words: str | Path, command: tuple[str, ...]) -> str:
    """Run a command that has to end with exit code 2 and one sentence; return that."""
    argv = [*command, *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("nbdproxy: ")]
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and "fault of nbdproxy" not in done.stderr, done.stderr
    assert len(said) == 1, done.stderr
    return said[0]


@pytest.mark.parametrize(
    ("fault", "file"),
    [
        ("mkdirat:ENOSPC", None),
        ("fsync:EBADFD", "run"),
        ("fallocate:EDQUOT", "run/events.tail"),
        ("mmap:ENOMEM", "run/data.tail"),
        ("bind:ENOSPC", None),
    ],
)
def test_a_start_that_fails_is_one_sentence(
    tmp_path: Path, image: Path, fault: str, file: str | None
) -> None:
    """And the same command works when the fault is gone, with a new folder for the recording."""
    command = injected(fault, paths=() if file is None else (tmp_path / file,))
    where = ("--socket", tmp_path / "socket")
    words = ("serve", image, *where, "--run", "true", "--record")
    one_sentence(*words, tmp_path / "run", command=command)
    nbdproxy(*words, tmp_path / "again")


def test_a_signal_that_interrupts_a_call_is_no_failure(tmp_path: Path, image: Path) -> None:
    run = tmp_path / "run"
    calls = "pwrite64,preadv2,fallocate,fdatasync,fsync,openat"
    command = injected(f"{calls}:EINTR:when=1", paths=(image, run, run / "data", run / "events"))
    with Server(image, "--record", run, command=command) as server:
        with server.client() as client:
            for op in (
                Op(WRITE, 0, data=b"x" * 4096), Op(TRIM, 8192, 4096), Op(ZERO, 65536, 4096),
                Op(FLUSH), Op(READ, 0, 4096),
            ):  # fmt: skip
                assert client.do(op)[0].error == 0, op
        assert server.stop() == 0, server.stderr
    with Recording(run) as recording:
        assert recording.missing is None and recording.ending is not None


@pytest.mark.parametrize(
    ("fault", "file", "ends"),
    [
        ("pwrite64:EIO", "image", ({nbd.EIO}, 0)),
        ("fallocate:EDQUOT", "image", ({nbd.ENOSPC}, 0)),
        ("fdatasync:EIO", "run/data.tail", ({nbd.ENOSPC, nbd.EIO}, 2)),
        ("pwrite64:EDQUOT", "run/events", (set(), 2)),
        ("fsync:EBADFD:when=3+", "run", (set(), 2)),
        ("unlink:EIO", "socket", (set(), 0)),
        ("write,writev:EIO", "log", (set(), 0)),
    ],
)
def test_a_call_that_fails_while_serving(
    tmp_path: Path, image: Path, fault: str, file: str, ends: tuple[set[int], int]
) -> None:
    """Nothing that was acknowledged is lost, and what failed is said if anything may be."""
    errors, code = ends
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir(mode=0o700)
    words = injected(fault, paths=(tmp_path / file,))
    if file == "log":
        words = ("sh", "-c", f'exec "$@" 2>>{log}', "sh", *words)
    options = ("--record", run, "--socket", tmp_path / "socket", "--sync-recording")
    with Server(image, *options, command=words) as server:
        client = server.client()
        ops = (Op(WRITE, 0, data=b"x" * 4096), Op(TRIM, 8192, 4096), Op(FLUSH))
        found = [client.do(op)[0].error for op in ops]
        assert set(found) - {0} <= errors, found
        assert bool(set(found) - {0}) == bool(errors), found
        client.drop()
        assert (server.wait() if "tail" in file and code else server.stop()) == code, server.stderr
        told = server.stderr
    assert "Traceback" not in told
    assert ("nbdproxy: " in told) == (code == 2), told
    with Recording(run) as recording:
        assert recording.missing is None or code == 2
        done = int(((recording.table.completed != NEVER) & (recording.table.error == 0)).sum())
        assert done >= found.count(0)
        recording.verify()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recording `run`, and a pack of it. Only to be read."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "image").write_bytes(b"-" * MIB)
    with Server(folder / "image", "--record", folder / "run") as server:
        server.client().write(0, b"x" * 65536)
        assert server.stop() == 0
    nbdproxy("pack", folder / "run", "-o", folder / "packed")
    return folder


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("pack {0}/run -o out", "renameat:EIO"),
        ("unpack {0}/packed -o out", "mkdirat:ENOSPC"),
        ("unpack {0}/packed -o out", "fsync:EIO"),
        ("open {0}/run --at end -o out", "ftruncate:EDQUOT"),
        ("open {0}/run --at end -o out", "renameat,unlinkat:EIO"),
        ("pack {0}/run -o out", "--fsize=256"),
        ("convert {0}/run out --to dm-log-writes", "--fsize=4096"),
    ],
)
def test_a_file_that_cannot_be_written_has_no_name(
    made: Path, tmp_path: Path, command: str, fault: str
) -> None:
    """Only what cannot be removed stays, and not in the way."""
    words = [word.format(made) for word in command.split()]
    words = [str(tmp_path / "out") if word == "out" else word for word in words]
    limited = ("prlimit", fault, *COMMAND)  # a write that fails, of no name that is known
    told = one_sentence(*words, command=limited if "fsize" in fault else injected(fault))
    assert not (tmp_path / "out").exists(), told
    assert "unlinkat" in fault or not list(tmp_path.iterdir()), told
    nbdproxy(*words)

"""What a machine lacks is said in a sentence with what to do, exit code 2; never as our fault."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nbdproxy.errors import RecordingError, UsageError
from nbdproxy.machine import make_room_for_exports, said_of
from nbdproxy.recording.meta import Meta
from nbdproxy.recording.packed import PackIndex
from tests.support.serving import COMMAND

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, 4 * MIB)
    return path


def run(
    *words: str | Path, limits: str = "true", code: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell that has set limits."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'{limits} && exec "$@"', "sh", *COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def exports(folder: Path, count: int) -> list[Path]:
    images = [folder / f"disk{number}" for number in range(count)]
    for one in images:
        one.write_bytes(bytes(MIB))
    return images


def test_many_recorded_exports_raise_the_limit_of_open_files(tmp_path: Path) -> None:
    words: list[str | Path] = [*exports(tmp_path, 8), "--record", tmp_path / "runs"]
    done = run("serve", *words, "--run", "ulimit -Sn", limits="ulimit -Sn 64", code=0)
    assert int(done.stdout) > 64


def test_too_low_a_limit_of_open_files_says_what_is_needed(tmp_path: Path) -> None:
    words: list[str | Path] = [*exports(tmp_path, 8), "--record", tmp_path / "runs"]
    done = run("serve", *words, "--run", "true", limits="ulimit -n 64")
    assert "8 exports need up to 128 open files, and 64 are allowed; raise the limit" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_exports_are_said_to_need_is_enough(tmp_path: Path) -> None:
    words: list[str | Path] = [*exports(tmp_path, 8), "--record", tmp_path / "runs"]
    words += ["--sync-recording"]
    run("serve", *words, "--run", "true", limits="ulimit -n 128", code=0)


def test_a_limit_is_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("it was changed"))
    make_room_for_exports(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    make_room_for_exports(10_000)


def test_a_folder_for_temporary_files_that_is_missing(image: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    run("serve", image, "--run", "true", TMPDIR=missing, code=0)  # its socket is in /tmp then
    done = run("serve", image, "--overlay", "--run", "true", TMPDIR=missing)
    assert f"{missing}, cannot be used: No such file or directory; make it, or set" in done.stderr


def test_a_limit_on_the_size_of_files(image: Path, tmp_path: Path) -> None:
    done = run(
        "serve", image, "--record", tmp_path / "run", "--run", "true", limits="ulimit -f 1024"
    )
    assert "cannot grow: File too large; raise the limit (ulimit -f)" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EFBIG, errno.EAGAIN])
def test_an_error_that_nobody_took_is_the_machines(number: int) -> None:
    script = (
        "import nbdproxy.cli.app as a\n"
        "def broken():\n"
        f"    raise OSError({number}, 'it does not work', '/some/path')\n"
        "a.app = broken\n"
        "a.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nbdproxy: /some/path: it does not work; ")
    assert "Traceback" not in done.stderr


def test_what_may_be_our_fault_is_called_so() -> None:
    assert said_of(OSError(errno.EBADF, "bad")) is None
    assert said_of(ValueError()) is None
    assert said_of(MemoryError()) is not None


def test_a_path_that_is_not_utf8(image: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    image.rename(odd)
    runs = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xfe"))
    run("serve", odd, "--record", runs, "--run", "true", code=0)
    run("open", runs, "--at", "end", "-o", tmp_path / "state", code=0)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", os.fsencode(odd) + b".qcow2", "4M"], check=True
    )
    done = run("serve", f"{odd}.qcow2", "--format", "qcow2", "--run", "true")
    assert "is not UTF-8, and QEMU opens no such path; rename it" in done.stderr


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1e3", '"x"', "[1]", "null"])
def test_a_version_that_is_no_number_of_ours(number: str) -> None:
    with pytest.raises(RecordingError):
        PackIndex.parse(f'{{"version":{number}}}'.encode(), Path("file"))
    with pytest.raises(RecordingError):
        Meta.parse(f'{{"version":{number}}}')


def test_workers_need_room_in_shared_memory(image: Path, tmp_path: Path) -> None:
    """sem_open(3) makes a file there under another name first, and then links it."""
    run("serve", image, "--record", tmp_path / "run", "--run", "true", code=0)
    full = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=link")
    words = ("-e", "inject=link:error=ENOSPC", *COMMAND, "explore", str(tmp_path / "run"))
    done = subprocess.run(
        [*full, *words, "--check", "true", "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "nbdproxy: no workers can be started: No space left on device; make room in /dev/shm, "
        "which has to be there, or use --workers 1\n"
    )


def test_workers_need_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbdproxy.crash.explore import workers  # noqa: PLC0415 - it takes a while

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", full)
    with pytest.raises(UsageError, match="make room in /dev/shm"):
        workers.PoolRunner(None, 2)  # type: ignore[arg-type]

"""A recording that cannot grow stops the export: nothing passes unrecorded.

The full disk is a limit on the size of files, which needs no root: beyond it the kernel answers
EFBIG (`prlimit --fsize`; Python ignores SIGXFSZ). The limit is far above the image and the tails.

Not covered: a disk that is full before the recording begins (`tests/recording`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.recording.index import NEVER
from nbdproxy.requests import Command
from tests.support import nbd_client as nbd
from tests.support.nbd_client import FLUSH, WRITE, NbdClient, NbdError, Op
from tests.support.serving import COMMAND, Server, nbdproxy

MIB = 1 << 20
LIMIT = 24 * MIB
FULL = {nbd.ENOSPC, nbd.EIO}


def write_until_refused(client: NbdClient) -> tuple[int, int]:
    """Write and flush; return how many writes succeeded and the first error, 0 for a hang-up."""
    done = 0
    for turn in range(200):
        ops = [Op(WRITE, n * 65536, data=bytes([turn + 1]) * 65536) for n in range(8)]
        try:
            writes = [reply.error for reply in client.do(*ops)]
            # What is held goes to the image, so that the cache's own file stays below the limit.
            flushes = [reply.error for reply in client.do(Op(FLUSH))]
        except OSError:
            return done, 0
        done += writes.count(0)
        errors = [error for error in writes + flushes if error]
        if errors:
            assert (writes + flushes)[-len(errors) :] == errors, "a success after a refusal"
            check_stays_refused(client)
            return done, errors[0]
    raise AssertionError("the limit was never reached")


def check_stays_refused(client: NbdClient) -> None:
    """After the first refusal nothing that changes the disk succeeds any more."""
    for op in (Op(WRITE, 0, data=bytes(512)), Op(FLUSH), Op(WRITE, 0, data=bytes(512), flags=1)):
        try:
            (reply,) = client.do(op)
        except OSError:
            return  # hung up, which is no success either
        assert reply.error in FULL


@pytest.mark.parametrize("policy", ["passthrough", "drop-unflushed"])
def test_a_recording_that_cannot_grow_stops_the_export(tmp_path: Path, policy: str) -> None:
    image, run = tmp_path / "image", tmp_path / "run"
    image.write_bytes(bytes(MIB))
    command = ("prlimit", f"--fsize={LIMIT}", *COMMAND)
    options = ("--record", run, "--policy", policy, "--overlay")
    with Server(image, *options, command=command) as server:
        done, error = write_until_refused(server.client())
        assert error in FULL | {0}
        assert server.wait() == 2
        told = server.stderr
        assert "cannot grow" in told
        assert "Traceback" not in told
        last = told.strip().splitlines()[-1]
        assert last.startswith("nbdproxy: the recording")
        assert "ulimit -f" in last
    assert done * 65536 > LIMIT // 2
    source = RecordedSource(run)
    source.verify()
    assert source.missing is not None
    table = source.table
    answered = (table.completed != NEVER) & (table.error == 0) & (table.command == Command.WRITE)
    assert int(answered.sum()) >= done
    source.close()
    nbdproxy("info", run)
    nbdproxy("open", run, "--at", "end", "-o", tmp_path / "state")


def test_the_image_itself_may_be_full(tmp_path: Path) -> None:
    """A write that the image's disk refuses is an ENOSPC; the export and its recording live on."""
    image, run = tmp_path / "image", tmp_path / "run"
    image.write_bytes(bytes(MIB))
    with image.open("r+b") as file:
        file.truncate(64 * MIB)
    command = ("prlimit", f"--fsize={LIMIT}", *COMMAND)
    with Server(image, "--record", run, command=command) as server:
        with server.client() as client:
            with pytest.raises(NbdError) as refused:
                client.write(32 * MIB, b"A" * 4096)
            assert refused.value.errno == nbd.ENOSPC
            client.write(0, b"A" * 4096)
            client.flush()
        assert server.stop() == 0
    assert image.read_bytes()[:4096] == b"A" * 4096
    nbdproxy("open", run, "--at", "end", "-o", tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == image.read_bytes()

"""`convert` with the programs whose formats it speaks: QEMU's blklogwrites, nbd-server, nbd-trplay.

The same requests go through nbdproxy, which records them, and through the other program, which
logs them; what both say of the disk at each flush is compared byte for byte, and the end with the
image. In the other direction nbd-trplay replays what we write.

Not covered: replay-log of xfstests, which is in no package; `tests/support/foreign.py` stands in
for it. Logs of the kernel's dm-log-writes target: they need a guest (`tests/lab`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdproxy.recording.index import NEVER
from nbdproxy.recording.reader import Recording
from nbdproxy.requests import Command
from tests.support.foreign import convert, end, flushed, replay_log
from tests.support.lower import is_running
from tests.support.proxies import Proxy
from tests.support.serving import DEADLINE_S, tool, until
from tests.support.shell import nbdsh
from tests.support.workload import Load, make_image

SIZE = 1 << 20

LOAD = """
import random
dice = random.Random(SEED)
done = []
for step in range(STEPS):
    sectors = dice.choice((1, 1, 2, 8, 40))
    at = dice.randrange(h.get_size() // 512 - sectors) * 512
    fua = nbd.CMD_FLAG_FUA if dice.random() < 0.2 else 0
    what = dice.choice("wwwwwzzdff")
    if what == "f":
        fua = 0
    if what == "w":
        h.pwrite(dice.randbytes(sectors * 512), at, fua)
    elif what == "z":
        h.zero(sectors * 512, at, fua)
    elif what == "d":
        h.trim(sectors * 512, at, fua)
    else:
        h.flush()
    done.append(what.upper() if fua else what)
tell(done)
"""


def load(uri: str, seed: int, steps: int = 120) -> list[str]:
    """Send requests, one after the other; return them: w, z, d, f, or W, Z, D with FUA."""
    told = nbdsh(f"SEED, STEPS = {seed}, {steps}", LOAD, uri=uri)
    assert isinstance(told, list)
    return told


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in the first half, a hole behind it."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(7).randbytes(SIZE // 2))
    with path.open("r+b") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def base(tmp_path: Path, image: Path) -> Path:
    """The image as it was."""
    return Path(shutil.copy(image, tmp_path / "base"))


@contextmanager
def blklogwrites(folder: Path, image: Path, log: Path) -> Iterator[str]:
    """Run qemu-storage-daemon with a log of what it writes to the image; yields its URI."""
    socket = folder / "qsd"
    log.touch()
    process = subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=image,filename={image},discard=unmap"),
            *("--blockdev", f"driver=file,node-name=log,filename={log}"),
            *("--blockdev", "driver=blklogwrites,node-name=both,file=image,log=log,discard=unmap"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"),
            *("--export", "nbd,id=export,node-name=both,name=,writable=on"),
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        until(lambda: socket.exists() or process.poll() is not None, "the daemon listens")
        assert process.poll() is None, "qemu-storage-daemon did not start"
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def test_a_log_of_blklogwrites_says_what_our_recording_of_the_same_says(
    image: Path, base: Path, tmp_path: Path
) -> None:
    log, run, back = tmp_path / "log", tmp_path / "run", tmp_path / "back"
    with (
        blklogwrites(tmp_path, image, log) as uri,
        Proxy(tmp_path / "proxy", uri, "--record", run) as proxy,
    ):
        sent = load(proxy.uri, seed=1)
        assert proxy.stop() == 0
    done = convert(log, back, "--to", "nbdproxy", "--base", base, "--verify", image, "--json")
    assert json.loads(done.stdout)["verified"] is True
    ours, theirs = flushed(run, base), flushed(back, base)
    assert min(sent.count("f"), sum(kind in "WZD" for kind in sent)) > 10
    asked = [theirs[place] for place in _listed(sent)]
    assert asked == ours[: len(asked)]
    assert len(set(asked)) > 10
    assert end(back, base) == end(run, base) == image.read_bytes()


def _listed(sent: list[str]) -> list[int]:
    """Return the number of the log's flush that holds for each flush that was asked for.

    QEMU lists a flush behind whatever had FUA, which covers more than FUA does. It lists none
    where it believes that nothing was written since the last one; a write with FUA counts as
    written only behind its own flush.
    """
    places, count, dirty = [], 0, False
    for kind in sent:
        dirty |= kind in "wzdD"
        if kind in "fWZD" and dirty:
            count, dirty = count + 1, False
        dirty |= kind in "WZ"
        if kind == "f":
            places.append(count - 1)
    assert places[0] >= 0, "the first request is a flush: choose another seed"
    return places


def test_a_log_of_blklogwrites_goes_on_behind_its_count_if_it_is_killed(
    image: Path, base: Path, tmp_path: Path
) -> None:
    """The superblock is written at a flush only: what came after it is not counted."""
    log = tmp_path / "log"
    with blklogwrites(tmp_path, image, log) as uri:
        nbdsh("h.pwrite(b'a' * 512, 0); h.flush(); h.pwrite(b'b' * 1024, 512); tell(0)", uri=uri)
        shutil.copy(log, tmp_path / "killed")
    done = convert(tmp_path / "killed", tmp_path / "one", "--to", "nbdproxy", "--base", base)
    assert "2 entries that the superblock counts stand 1 more" in done.stderr
    assert "--uncounted takes them in" in done.stderr
    assert end(tmp_path / "one", base)[:1536] == b"a" * 512 + base.read_bytes()[512:1536]
    words = ("--to", "nbdproxy", "--base", base, "--uncounted", "--verify", image)
    done = convert(tmp_path / "killed", tmp_path / "two", *words)
    assert "taken in, as --uncounted asks" in done.stderr
    assert end(tmp_path / "two", base)[:1536] == b"a" * 512 + b"b" * 1024


@contextmanager
def nbd_server(folder: Path, image: Path, log: Path) -> Iterator[str]:
    """Run nbd-server with a transaction log; yields the URI of its export."""
    socket, pid_file, config = folder / "nbd", folder / "pid", folder / "config"
    config.write_text(
        f"[generic]\nunixsock = {socket}\nallowlist = true\n[disk]\nexportname = {image}\n"
        f"transactionlog = {log}\ndatalog = true\nflush = true\nfua = true\ntrim = true\n"
    )
    tool("nbd-server", "-C", config, "-p", pid_file)
    until(lambda: pid_file.exists() and pid_file.read_text().strip() != "", "nbd-server runs")
    pid = int(pid_file.read_text())
    try:
        until(socket.exists, "nbd-server listens")
        yield f"nbd+unix:///disk?socket={socket}"
    finally:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not is_running(pid), "nbd-server ends")


def test_a_log_of_nbd_server_says_what_our_recording_of_the_same_says(
    image: Path, base: Path, tmp_path: Path
) -> None:
    log, run, back = tmp_path / "log", tmp_path / "run", tmp_path / "back"
    with nbd_server(tmp_path, image, log) as uri:
        with Proxy(tmp_path / "proxy", uri, "--record", run) as proxy:
            sent = load(proxy.uri, seed=2)
            assert proxy.stop() == 0
        _settles(log)
    words = ("--to", "nbdproxy", "--base", base, "--verify", image, "--json")
    assert json.loads(convert(log, back, *words).stdout)["verified"] is True
    ours, theirs = flushed(run, base), flushed(back, base)
    assert len(ours) >= sent.count("f") > 10
    assert theirs[: len(ours)] == ours
    # It leaves the data of what was trimmed in the second half of the disk, as a store may.
    assert end(back, base) == end(run, base)


def _settles(log: Path) -> None:
    """Wait until the server's process for the client, which nobody can wait for, has ended."""
    size = -1
    while size != (size := log.stat().st_size):
        time.sleep(0.1)


def test_what_nbd_server_refused_changes_nothing(image: Path, base: Path, tmp_path: Path) -> None:
    log, back = tmp_path / "log", tmp_path / "back"
    with nbd_server(tmp_path, image, log) as uri:
        refused = nbdsh(
            f"""
            h.set_request_structured_replies(False)  # nbd-trplay 3.26 knows simple ones only
            h.connect_uri({uri!r})
            h.set_strict_mode(0)
            h.pwrite(b'a' * 512, 0)
            tell(outcome(lambda: h.pwrite(b'b' * 512, {SIZE})))
            h.pread(512, 0)
            h.shutdown()
            """
        )
        assert refused == "ENOSPC"
        _settles(log)
    words = ("--to", "nbdproxy", "--base", base, "--verify", image, "--json")
    done = convert(log, back, *words)
    assert "1 request was answered with an error (0 within the disk)" in done.stderr
    assert json.loads(done.stdout)["left_out"]["beyond the disk's end"] == 1
    recording = Recording(back)
    assert recording.refused == 1
    assert len(recording.table) == 1
    replayed = shutil.copy(base, tmp_path / "replayed")
    tool("nbd-trplay", "-i", replayed, "-l", log)
    assert Path(replayed).stat().st_size == SIZE + 512, "nbd-trplay does not carry it out after all"


def test_two_clients_of_nbd_server_overwrite_each_others_log(
    image: Path, base: Path, tmp_path: Path
) -> None:
    """The log looks whole and is not, so only the image can tell."""
    log = tmp_path / "log"
    with nbd_server(tmp_path, image, log) as uri:
        nbdsh("h.pwrite(b'a' * 512, 0); h.pwrite(b'a' * 512, 512); tell(0)", uri=uri)
        _settles(log)
        nbdsh("h.pwrite(b'b' * 512, 4096); tell(0)", uri=uri)
        _settles(log)
    words = ("--to", "nbdproxy", "--base", base, "--verify", image)
    done = convert(log, tmp_path / "back", *words, code=1)
    assert f"differs from {image}, first at byte 0:" in done.stderr


def test_nbd_trplay_leaves_the_disk_that_we_say(tmp_path: Path) -> None:
    """Several clients at once, with overlapping requests in flight."""
    image, run, log = tmp_path / "image", tmp_path / "run", tmp_path / "log"
    make_image(image, random.Random(3))
    base = Path(shutil.copy(image, tmp_path / "base"))
    with Proxy(tmp_path / "proxy", image, "--record", run) as proxy:
        clients = Load(proxy.client, seed=3, connections=3)
        until(lambda: clients.sent > 2000, "the clients have sent enough")
        clients.calm.set()
        clients.join()
        assert proxy.stop() == 0
    convert(run, log, "--to", "nbd-trlog", "--verify", image)
    replayed = Path(shutil.copy(base, tmp_path / "replayed"))
    tool("nbd-trplay", "-i", replayed, "-l", log)
    assert replayed.read_bytes() == end(run) == image.read_bytes()
    dumped = subprocess.run(
        ["nbd-trdump"], stdin=log.open("rb"), capture_output=True, text=True, timeout=60, check=True
    ).stdout
    recording = Recording(run)
    assert "Unknown" not in dumped
    assert dumped.count("NBD_CMD_FLUSH") == (recording.table.command == Command.FLUSH).sum()
    assert dumped.count("< H=") == (recording.table.completed != NEVER).sum()


def test_every_flush_of_our_dm_log_writes_is_our_own_crash_state(
    image: Path, base: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with Proxy(tmp_path / "proxy", image, "--record", run) as proxy:
        load(proxy.uri, seed=4)
        assert proxy.stop() == 0
    convert(run, log, "--to", "dm-log-writes", "--verify", image)
    seen: list[bytes] = []
    disk = bytearray(base.read_bytes())
    assert replay_log(log, disk, seen.append) == ["dm-log-writes-end"]
    assert len(seen) > 10
    assert seen == flushed(run)
    assert bytes(disk) == image.read_bytes()

"""What is refused, what goes wrong on the way, and what is not played."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import ImageError, ProjectionError, RecordingError
from nbdproxy.persistence.model import Level
from nbdproxy.persistence.modes import CacheMode
from nbdproxy.recording.format import data_path
from nbdproxy.recording.reader import Recording
from nbdproxy.reenactment.reenact import PlaySource, reenact
from nbdproxy.reenactment.result import FileSource, Reenacted
from nbdproxy.requests import Command
from tests.reenactment.images import KINDS, SIZE
from tests.reenactment.plays import Recorded, Workload, flushed_cuts, record
from tests.support.fork_server import shared
from tests.support.nbd_client import FLUSH, FUA, WRITE, NbdClient, Op
from tests.support.proxies import Proxy
from tests.support.serving import tool

POLICY = """
summary = "Writes at one place fail, those at another are never answered"
imitates = "A disk with a bad place"
sources = ["made up"]
[[rule]]
name = "bad"
command = "write"
range = "0-64k"
action = "error"
errno = "EIO"
[[rule]]
name = "slow"
command = "write"
range = "64k-128k"
action = "hang"
[[example]]
do = ["write 0 A -> EIO"]
image = ["-"]
"""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No process of ours is left behind by any test here."""
    shared()
    before = _children()
    yield
    assert _children() <= before


def _children() -> set[int]:
    found = set()
    for words in Path("/proc/self/task").glob("*/children"):
        found |= {int(word) for word in words.read_text().split()}
    return found


def _writes(client: NbdClient) -> None:
    for at in range(8):
        client.write(at * 65536, bytes([at + 1]) * 65536)
    client.flush()
    client.write(SIZE - 65536, b"Z" * 65536)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """Some writes, and a flush before the last of them."""
    return record(KINDS["new"](tmp_path), _writes)


def test_played_twice_the_guest_finds_the_same(tmp_path: Path) -> None:
    """The driver may put its clusters elsewhere, which the guest does not see."""
    work = record(KINDS["full"](tmp_path), Workload(5, bursts=30))
    cuts = flushed_cuts(work.run)
    one, other = (work.play(CacheMode.NONE, cuts=cuts, name=name) for name in ("one", "other"))
    exact = [cut for cut in (*cuts[::4], len(one.exact) - 1) if one.exact[cut]]
    assert len(exact) > 2
    for cut in exact:
        views = [
            work.below(played, played.positions[cut].tolist(), Level.COMPLETED)
            for played in (one, other)
        ]
        assert views[0] == views[1]


def test_what_was_saved_is_what_was_played(recorded: Recorded) -> None:
    played = recorded.play(CacheMode.NONE)
    again = Reenacted.load(played.folder)
    assert (again.mode, again.qemu, again.files) == (CacheMode.NONE, played.qemu, ("file",))
    assert (again.positions == played.positions).all()
    assert (again.exact == played.exact).all()
    assert again.qemu.startswith("qemu-storage-daemon version")
    with Recording(recorded.run) as above, Recording(played.recording("file")) as below:
        assert len(played.positions) == len(played.exact) == above.events + 1
        assert (played.positions[1:] >= played.positions[:-1]).all()
        assert played.positions[-1, 0] < below.events, "at its end the driver writes its tables"
    (played.folder / "about.json").unlink()
    with pytest.raises(RecordingError, match="no whole re-enactment"):
        Reenacted.load(played.folder)


def test_unsafe_has_no_flush_and_the_others_have_theirs(recorded: Recorded) -> None:
    flushes = {}
    for mode in (CacheMode.UNSAFE, CacheMode.NONE, CacheMode.WRITETHROUGH):
        with Recording(recorded.play(mode).recording("file")) as below:
            flushes[mode] = int((below.table.command == Command.FLUSH).sum())
            assert not below.table.is_fua.any()
    assert flushes[CacheMode.UNSAFE] == 0
    assert 0 < flushes[CacheMode.NONE] < flushes[CacheMode.WRITETHROUGH]


def test_what_failed_is_not_played_and_what_was_not_answered_comes_last(tmp_path: Path) -> None:
    def work(client: NbdClient) -> None:
        (failed,) = client.do(Op(WRITE, 0, data=b"F" * 512))
        assert failed.error
        client.send(Op(WRITE, 65536, data=b"H" * 65536))
        client.write(131072, b"A" * 65536)
        client.flush()
        client.drop()

    policy = tmp_path / "bad.toml"
    policy.write_text(POLICY)
    run = record(KINDS["new"](tmp_path), work, "--policy", policy)
    played = run.play(CacheMode.NONE)
    end = len(played.exact) - 1
    assert played.exact[end]
    view = run.below(played, played.positions[end].tolist(), Level.RECEIVED)
    assert view[: 3 * 65536] == bytes(2 * 65536) + b"A" * 65536
    view = run.below(played, run.ends(played), Level.RECEIVED)
    assert view[: 3 * 65536] == bytes(65536) + b"H" * 65536 + b"A" * 65536


def test_requests_of_any_bytes_and_longer_ones_than_qemu_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdproxy.reenactment.reenact._LONGEST", 3 << 20)
    dice = random.Random(1)

    def work(client: NbdClient) -> None:
        for _ in range(30):
            client.write(dice.randrange(1 << 20), dice.randbytes(dice.choice((1, 511, 4097))))
        client.zero(65536, SIZE - 65536)
        client.write(SIZE - 7, b"the end")

    recorded = record(KINDS["full"](tmp_path), work)
    played = recorded.play(CacheMode.NONE)
    found = recorded.below(played, recorded.ends(played), Level.RECEIVED)
    assert found == recorded.above(len(played.exact) - 1, Level.RECEIVED)


def test_a_disk_with_more_tables_than_qemu_caches_is_remarked(tmp_path: Path) -> None:
    remarks = []
    for number, options in enumerate(("cluster_size=4k", "cluster_size=64k")):
        folder = tmp_path / str(number)
        folder.mkdir()
        image = folder / "disk.qcow2"
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "17G")
        run = folder / "above"
        with Proxy(folder / "proxy", image, "--format", "qcow2", "--record", run) as proxy:
            with proxy.client() as client:
                client.flush()
            assert proxy.stop() == 0
        with Recording(run) as recording:
            done = reenact(PlaySource(recording, image), CacheMode.NONE, folder / "run")
        remarks.append(done.remark)
    assert "larger than QEMU's cache" in remarks[0]
    assert remarks[1] == ""


def test_another_disk_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    tool("qemu-img", "resize", "-q", recorded.image, "9M")
    with pytest.raises(ImageError, match=f"has {9 << 20} bytes.*recorded {SIZE}"):
        recorded.play(CacheMode.NONE)
    with Recording(recorded.run) as recording:
        with pytest.raises(ImageError, match="no qcow2 header"):
            reenact(PlaySource(recording, recorded.raw), CacheMode.NONE, tmp_path / "raw")
        with pytest.raises(ImageError, match="there is no image"):
            reenact(PlaySource(recording, tmp_path / "gone"), CacheMode.NONE, tmp_path / "gone-run")


def test_what_qemu_cannot_open_is_told_in_its_words(tmp_path: Path) -> None:
    recorded = record(KINDS["on-backing-file"](tmp_path), _writes)
    (tmp_path / "base.qcow2").rename(tmp_path / "moved")
    with pytest.raises(ImageError, match=r"cannot open the image: .*base\.qcow2"):
        recorded.play(CacheMode.NONE)


def test_where_the_guest_saw_no_cache_its_flushes_are_missing(tmp_path: Path) -> None:
    def work(client: NbdClient) -> None:
        client.write(0, b"A" * 65536, FUA)
        client.write(65536, b"B" * 65536, FUA)

    recorded = record(KINDS["new"](tmp_path), work)
    with pytest.raises(ProjectionError, match="none"):
        recorded.play(CacheMode.NONE)
    played = recorded.play(CacheMode.WRITETHROUGH)
    view = recorded.below(played, played.positions[-1].tolist(), Level.FLUSHED)
    assert view[: 2 * 65536] == b"A" * 65536 + b"B" * 65536


def test_a_damaged_payload_is_not_played(recorded: Recorded) -> None:
    with data_path(recorded.run).open("r+b") as data:
        data.seek(-65536, os.SEEK_END)
        place = data.tell() - 65536
        data.seek(place)
        byte = data.read(1)
        data.seek(place)
        data.write(bytes([byte[0] ^ 1]))
    with pytest.raises(RecordingError, match="is damaged"):
        recorded.play(CacheMode.NONE)
    with closing(FileSource(recorded.folder / "none" / "file", recorded.image)) as source:
        assert source.ending is not None
        assert source.ending.reason == "the re-enactment failed"


def test_a_driver_that_dies_is_told(recorded: Recorded, tmp_path: Path) -> None:
    before = _children()

    def kill(_done: int, _all: int) -> None:
        for pid in _children() - before:
            os.kill(pid, signal.SIGKILL)

    with Recording(recorded.run) as recording, pytest.raises(ImageError, match="is lost"):
        played = PlaySource(recording, recorded.image)
        reenact(played, CacheMode.NONE, tmp_path / "run", progress=kill)


def test_the_image_is_held_and_never_written_to(recorded: Recorded, tmp_path: Path) -> None:
    """Nobody may write to it meanwhile, and it is not written to by the play."""
    content = recorded.image.read_bytes()

    def look(_done: int, _all: int) -> None:
        with pytest.raises(ImageError, match="in use"):
            FileDisk(recorded.image).close()

    with Recording(recorded.run) as recording:
        reenact(
            PlaySource(recording, recorded.image), CacheMode.NONE, tmp_path / "a", progress=look
        )
    assert recorded.image.read_bytes() == content
    FileDisk(recorded.image).close()
    with Recording(recorded.run) as recording, pytest.raises(RecordingError, match="not empty"):
        reenact(PlaySource(recording, recorded.image), CacheMode.NONE, tmp_path / "a")


def test_a_flush_in_flight_makes_its_cuts_inexact(tmp_path: Path) -> None:
    def work(client: NbdClient) -> None:
        for at in range(20):
            client.send(Op(WRITE, at * 65536, data=b"A" * 65536), Op(FLUSH))
        while client.waiting:
            client.receive()

    recorded = record(KINDS["new"](tmp_path), work)
    played = recorded.play(CacheMode.NONE)
    assert played.exact[0]
    assert played.exact[-1]
    assert not played.exact.all()

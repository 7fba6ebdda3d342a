"""Each policy of the gallery under a real client: libnbd by nbdsh, and QEMU where it is about QEMU.

What the client sees is asserted, and what the image holds when it is over; the recording names the
rule that struck. The policies' own examples are run in tests/policy.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.policy.loader import names
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.reader import Recording
from tests.support.forked import ForkedServer
from tests.support.qemu import Qemu
from tests.support.serving import until
from tests.support.shell import nbdsh

SIZE = 1 << 20
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


def serve(image: Path, policy: str, *settings: str) -> ForkedServer:
    """The image under a policy, recorded."""
    options = [word for setting in settings for word in ("--set", setting)]
    run = image.parent / "run"
    return ForkedServer(image.parent, image, "--policy", policy, "--record", run, *options)


def play(image: Path, policy: str, script: str, *settings: str) -> Any:
    """Run a script against the image under a policy, end in order; return what it told."""
    with serve(image, policy, *settings) as server:
        told = nbdsh(script, uri=f"nbd+unix:///?socket={server.socket}")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    return told


def faults(image: Path) -> list[dict[str, Any]]:
    """What the recording says that rules did."""
    with_text = Recording(image.parent / "run").notes
    return [json.loads(note.text) for note in with_text if note.kind is NoteKind.FAULT]


def actions(image: Path) -> set[tuple[str, str]]:
    """Which rule did what, by the recording."""
    return {(fault.get("rule", ""), fault["action"]) for fault in faults(image)}


def blocks(image: Path, count: int = 4) -> str:
    """The first letter of each of the first blocks."""
    content = image.read_bytes()
    return "".join(chr(content[at * BLOCK]) for at in range(count))


WRITE = "block = lambda letter: letter.encode() * 4096\n"


def test_passthrough(image: Path) -> None:
    script = "h.pwrite(block('A'), 0); h.flush(); h.pwrite(block('B'), 4096); tell(1)"
    play(image, "passthrough", WRITE + script)
    assert blocks(image) == "AB--"
    assert not faults(image)


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("drop-unflushed", "A---"),
        ("cut-at-shutdown", "A---"),
        ("unsafe", "----"),
        ("lying-flush", "--C-"),
        ("writethrough-disk", "ABC-"),
        ("gluster-write-behind", "A-C-"),
    ],
)
def test_what_a_cut_leaves(image: Path, policy: str, left: str) -> None:
    fua = "" if policy in {"drop-unflushed", "cut-at-shutdown"} else ", nbd.CMD_FLAG_FUA"
    script = f"""
h.pwrite(block('A'), 0)
h.flush()
h.pwrite(block('B'), 4096)
h.pwrite(block('C'), 8192{fua})
tell([chr(h.pread(512, at)[0]) for at in (0, 4096, 8192)])
h.shutdown()
"""
    with serve(image, policy) as server:
        told = nbdsh(WRITE + script, uri=f"nbd+unix:///?socket={server.socket}")
        if policy != "cut-at-shutdown":
            server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    assert told == ["A", "B", "C"]
    assert blocks(image) == left
    if policy == "lying-flush":
        assert actions(image) == {("lying-flush/lies", "lie")}


def test_lying_flush_late(image: Path) -> None:
    script = "for at in range(4): h.pwrite(block('ABCD'[at]), at * 4096); h.flush()\ntell(1)"
    play(image, "lying-flush-late", WRITE + script, "honest=2")
    assert blocks(image) == "AB--"
    assert len(faults(image)) == 2


def test_fsyncgate(image: Path) -> None:
    script = """
h.pwrite(block('A'), 0)
first = outcome(h.flush)
second = outcome(h.flush)
h.pwrite(block('B'), 4096)
tell([first, second, outcome(h.flush), chr(h.pread(512, 0)[0])])
"""
    assert play(image, "fsyncgate", WRITE + script) == ["EIO", None, None, "A"]
    assert blocks(image) == "-B--"
    assert actions(image) == {("fsyncgate/fails once", "fsyncgate")}


def test_gluster_write_behind_drops_its_window(image: Path) -> None:
    script = """
for at in range(8): h.pwrite(block('ABCDEFGH'[at]), at * 4096)
tell([outcome(h.flush), outcome(h.flush)])
h.shutdown()
"""
    settings = ("window=16K", "drops_window=true")
    assert play(image, "gluster-write-behind", WRITE + script, *settings) == ["EIO", None]
    assert blocks(image, 8) == "ABCD----"


def test_torn_writes(image: Path) -> None:
    script = (
        "h.pwrite(block('A'), 0); tell([chr(h.pread(512, at)[0]) for at in range(0, 4096, 512)])"
    )
    shown = play(image, "torn-writes", WRITE + script, "probability=1.0")
    assert set(shown) == {"A", "-"}
    assert blocks(image) == "A---"
    assert actions(image) == {("torn-writes/torn", "tear")}


@pytest.mark.parametrize("bake", [True, False])
def test_misdirected_writes(image: Path, bake: bool) -> None:
    options = ("--set", "probability=1.0", "--set", "shift=8192", *(["--bake"] if bake else []))
    with ForkedServer(image.parent, image, "--policy", "misdirected-writes", *options) as server:
        script = "h.pwrite(block('A'), 0); tell([chr(h.pread(512, at)[0]) for at in (0, 8192)])"
        told = nbdsh(WRITE + script, uri=f"nbd+unix:///?socket={server.socket}")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert told == ["-", "A"]
    assert blocks(image) == ("--A-" if bake else "A---")


def test_bit_rot(image: Path) -> None:
    script = """
h.pwrite(block('A'), 0)
def wrong():
    return sum(bin(one ^ 65).count('1') for one in h.pread(4096, 0))
tell([wrong(), wrong()])
"""
    assert play(image, "bit-rot", WRITE + script, "probability=1.0", "share=1e-9") == [1, 1]
    assert image.read_bytes()[:BLOCK] == b"A" * BLOCK


def test_bits_that_are_stuck(image: Path) -> None:
    script = "tell([h.pread(65536, 0) == h.pread(65536, 0), h.pread(65536, 0) == b'-' * 65536])"
    settings = ("share=1.0", "probability=1e-9")
    assert play(image, "bit-rot", script, *settings) == [True, False]


def test_bad_sectors(image: Path) -> None:
    script = """
read = lambda: h.pread(4096, 0)
tell([outcome(read), outcome(read), outcome(lambda: h.pwrite(block('A'), 0)), outcome(read)])
"""
    assert play(image, "bad-sectors", WRITE + script, "share=1.0") == ["EIO", "EIO", None, None]
    assert blocks(image) == "A---"
    assert actions(image) == {("bad-sectors/unreadable", "error")}


@pytest.mark.parametrize(
    ("policy", "slow", "quick"),
    [
        ("slow-disk", "h.pwrite(block('A'), 0)", "h.flush()"),
        ("slow-disk", "h.pread(512, 0)", "h.flush()"),
        ("slow-flush", "h.flush()", "h.pwrite(block('A'), 0)"),
    ],
)
def test_what_is_slow(image: Path, policy: str, slow: str, quick: str) -> None:
    script = f"""
def seconds(call):
    began = time.monotonic()
    call()
    return time.monotonic() - began
tell([seconds(lambda: {slow}), seconds(lambda: {quick})])
"""
    settings = ("delay_s=0.6",)
    late, early = play(image, policy, WRITE + script, *settings)
    assert late >= 0.6
    assert early < late


def test_hanging_disk(image: Path) -> None:
    script = """
h.pwrite(block('A'), 0)
aio = h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(block('B'))), 4096)
while h.aio_is_connecting(): h.poll(-1)
for _ in range(3): h.poll(200)
tell([h.aio_command_completed(aio), h.aio_in_flight()])
"""
    assert play(image, "hanging-disk", WRITE + script, "after=1") == [False, 1]
    assert blocks(image) == "A---"


def test_flaky_link(image: Path) -> None:
    script = """
h.pwrite(block('A'), 0)
tell([outcome(lambda: h.pwrite(block('B'), 4096)) is not None, h.aio_is_ready()])
"""
    assert play(image, "flaky-link", WRITE + script, "every=2") == [True, False]
    assert blocks(image) == "AB--"


def test_full_disk(image: Path) -> None:
    script = "tell([outcome(lambda: h.pwrite(block('A'), at * 4096)) for at in range(3)])"
    assert play(image, "full-disk", WRITE + script, "bytes=8K") == [None, None, "ENOSPC"]
    assert blocks(image) == "AA--"


def test_turns_read_only(image: Path) -> None:
    script = """
tell([outcome(lambda: h.pwrite(block('A'), at * 4096)) for at in range(3)]
     + [outcome(lambda: h.pread(512, 0))])
"""
    told = play(image, "turns-read-only", WRITE + script, "after=2")
    assert told == [None, None, "EPERM", None]
    assert blocks(image) == "AA--"


def test_reordering_cache(image: Path) -> None:
    script = "for at in range(64): h.pwrite(block('A'), at * 4096)\ntell(1)"
    play(image, "reordering-cache", WRITE + script, "window=64K")
    left = blocks(image, 64)
    assert set(left) == {"A", "-"}
    # No prefix of what was written: it was not the oldest that went first.
    assert "-" in left.rstrip("-")
    (survival,) = [fault for fault in faults(image) if fault["action"] == "survive"]
    assert survival["pieces"] == len(survival["seq_offset_length"]) < survival["held"]


def test_qemu_killed(image: Path) -> None:
    with serve(image, "qemu-killed") as server, Qemu(image.parent, server.socket) as qemu:
        qemu.io("write -P 65 0 4096")
        qemu.process.kill()
        assert server.wait() == 0, server.log
    assert blocks(image) == "A---"
    assert (NoteKind.CUT, "the client went away") in [
        (note.kind, note.text) for note in Recording(image.parent / "run").notes
    ]


def test_cut_at_shutdown_with_qemu(image: Path) -> None:
    options = ("--policy", "cut-at-shutdown", "--qmp", image.parent / "qmp-events")
    with (
        ForkedServer(image.parent, image, *options) as server,
        Qemu(image.parent, server.socket) as qemu,
    ):
        until(lambda: "listening to QMP" in server.log, "QMP is listened to")
        qemu.io("write -P 65 0 4096")
        qemu.quit()
        assert server.wait() == 0
    assert blocks(image) == "----"


def test_none_is_forgotten() -> None:
    tested: Sequence[str] = Path(__file__).read_text().replace("_", "-").split()
    words = " ".join(tested)
    for name in names():
        assert f'"{name}"' in words, f"write a test of {name} with a real client"

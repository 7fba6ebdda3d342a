"""When exactly a cut strikes and what a flush covers, request by request.

A flush covers what was completed before it was received: a write sent together with it is not
covered, one whose reply had come is. `cut-at-shutdown` strikes when the client leaves, or at the
SHUTDOWN event of a real QEMU, before the flushes that QEMU sends on its way out.

Not covered: real guests; those are the lab's.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nbdproxy.crash.states.cuts import resolve
from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.persistence.model import Level
from nbdproxy.recording.notes import NoteKind
from tests.support.forked import ForkedServer
from tests.support.nbd_client import FLUSH, FUA, WRITE, NbdClient, Op
from tests.support.qemu import Qemu
from tests.support.serving import until

SECTOR = 512
SIZE = 64 * 1024
OLD = b"-"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(OLD * SIZE)
    return path


def sectors(image: Path, count: int = 4) -> str:
    """The first letter of each of the first sectors."""
    content = image.read_bytes()
    return "".join(chr(content[at * SECTOR]) for at in range(count))


def write(at: int, letter: str, flags: int = 0) -> Op:
    return Op(WRITE, at * SECTOR, data=letter.encode() * SECTOR, flags=flags)


def serve(image: Path, *options: str | Path) -> ForkedServer:
    folder = image.parent
    return ForkedServer(folder, image, "--record", folder / "run", *options)


def is_dark(client: NbdClient) -> bool:
    """Whether a write gets no answer any more."""
    try:
        client.do(write(1, "B"))
    except OSError:
        return True
    return False


def check_equality(image: Path) -> None:
    """The law, for a recording that ended in a power cut."""
    source = RecordedSource(image.parent / "run")
    disk = open_state(source, StateId(source.events, Level.FLUSHED, Choice.MUST))
    assert disk.pread(0, disk.size) == image.read_bytes()
    disk.close()
    source.close()


def notes(image: Path) -> list[tuple[NoteKind, str]]:
    source = RecordedSource(image.parent / "run")
    found = [(note.kind, note.text) for note in source.notes]
    source.close()
    return found


def test_a_flush_does_not_cover_a_write_sent_together_with_it(image: Path) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        client = server.client()
        assert not any(reply.error for reply in client.do(write(0, "A"), Op(FLUSH)))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        client.drop()
    assert sectors(image) == "----"
    check_equality(image)


def test_a_flush_covers_a_write_whose_reply_had_come(image: Path) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        client = server.client()
        client.do(write(0, "A"))
        client.do(write(1, "B"), Op(FLUSH), write(2, "C"))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        client.drop()
    assert sectors(image) == "A---"
    check_equality(image)


def test_a_flush_covers_the_completed_writes_of_every_connection(image: Path) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        one, two = server.client(), server.client()
        one.do(write(0, "A"))
        two.do(write(1, "B"))
        two.do(Op(FLUSH))
        one.do(write(2, "C"))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        one.drop()
        two.drop()
    assert sectors(image) == "AB--"
    check_equality(image)


def test_fua_makes_its_own_extent_durable_and_nothing_else(image: Path) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        client = server.client()
        client.do(write(0, "A"), write(2, "C"))
        client.do(write(1, "B", FUA))
        client.do(write(1, "b"))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        client.drop()
    assert sectors(image) == "-B--"
    check_equality(image)


@pytest.mark.parametrize("turn", range(8))
def test_of_overlapping_fua_writes_in_flight_the_later_received_wins(
    image: Path, turn: int
) -> None:
    with serve(image, "--policy", "drop-unflushed") as server:
        client = server.client()
        letters = [chr(65 + n) for n in range(20)]
        client.do(*[write(0, letter, FUA) for letter in letters])
        assert client.read(0, 1 * SECTOR) == letters[-1].encode() * SECTOR
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        client.drop()
    assert sectors(image) == f"{letters[-1]}---"
    check_equality(image)


@pytest.mark.parametrize("says_disc", [True, False])
def test_the_power_goes_when_the_client_leaves(image: Path, says_disc: bool) -> None:
    with serve(image, "--policy", "cut-at-shutdown") as server:
        client = server.client()
        client.do(write(0, "A"))
        client.flush()
        client.do(write(1, "B"))
        if says_disc:
            client.disc()
        else:
            client.drop()
        assert server.wait() == 0, server.log
        with pytest.raises(OSError, match=r"refused|No such file"):
            NbdClient.at(server.socket)
    assert sectors(image) == "A---"
    check_equality(image)
    kinds = [kind for kind, _ in notes(image)]
    said = NoteKind.DISC if says_disc else NoteKind.EOF
    assert kinds == [NoteKind.POLICY, NoteKind.CONNECT, said, NoteKind.CUT, NoteKind.END]


def test_no_client_is_let_in_after_a_cut_while_the_command_runs(image: Path) -> None:
    """With --run the proxy lives on; the machine stays dark."""
    folder = image.parent
    command = f"echo nbd+unix:// is ready; read line < {folder}/fifo"
    os.mkfifo(folder / "fifo")
    with serve(image, "--policy", "cut-at-shutdown", "--run", command) as server:
        client, other = server.client(), server.client()
        client.do(write(0, "A"))
        client.drop()
        until(lambda: is_dark(other), "the other client is cut off")
        until(lambda: not server.socket.exists(), "the socket is gone")
        with pytest.raises(OSError):
            server.client()
        (folder / "fifo").write_text("go\n")
        assert server.wait() == 0
    assert sectors(image) == "----"
    check_equality(image)


def test_a_client_that_never_opened_the_export_is_no_power_cut(image: Path) -> None:
    with serve(image, "--policy", "cut-at-shutdown") as server:
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                NbdClient(f"nbd+unix:///nothing?socket={server.socket}")
        client = server.client()
        client.do(write(0, "A"))
        client.flush()
        client.disc()
        assert server.wait() == 0
    assert sectors(image) == "A---"


def test_qemus_exit_flushes_save_everything_without_qmp(image: Path) -> None:
    with (
        serve(image, "--policy", "cut-at-shutdown") as server,
        Qemu(image.parent, server.socket) as qemu,
    ):
        qemu.io("write -P 65 0 512")
        assert qemu.quit() == 0
        assert server.wait() == 0
    assert sectors(image) == "A---"
    check_equality(image)


@pytest.mark.parametrize("ending", ["quit", "terminate"])
def test_the_cut_at_qemus_shutdown_comes_before_its_exit_flushes(image: Path, ending: str) -> None:
    folder = image.parent
    options = ("--policy", "cut-at-shutdown", "--qmp", folder / "qmp-events")
    with serve(image, *options) as server, Qemu(folder, server.socket) as qemu:
        until(lambda: "listening to QMP" in server.log, "QMP is listened to")
        qemu.io("write -f -P 65 0 512")
        qemu.io("write -P 66 512 512")
        assert getattr(qemu, ending)() == 0
        assert server.wait() == 0
    assert sectors(image) == "A---"
    check_equality(image)
    assert (NoteKind.CUT, "QEMU reported SHUTDOWN") in notes(image)


@pytest.mark.parametrize("ending", ["quit", "terminate"])
def test_the_shutdown_note_stands_before_the_exit_flushes(image: Path, ending: str) -> None:
    folder = image.parent
    with (
        serve(image, "--qmp", folder / "qmp-events") as server,
        Qemu(folder, server.socket) as qemu,
    ):
        until(lambda: "listening to QMP" in server.log, "QMP is listened to")
        qemu.io("write -P 65 0 512")
        assert getattr(qemu, ending)() == 0
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    source = RecordedSource(folder / "run")
    cut = resolve(source, "before-exit")
    flushes = source.table.seq[source.table.is_flush]
    assert cut.note == "QEMU's SHUTDOWN event"
    assert len(flushes) == 2
    assert (flushes > cut.position).all()
    assert (source.table.seq[source.table.is_modifying] < cut.position).all()
    source.close()


def test_without_qmp_the_last_two_flushes_before_disc_count_as_qemus(image: Path) -> None:
    with serve(image) as server, Qemu(image.parent, server.socket) as qemu:
        qemu.io("write -P 65 0 512")
        assert qemu.quit() == 0
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    source = RecordedSource(image.parent / "run")
    cut = resolve(source, "before-exit")
    flushes = source.table.seq[source.table.is_flush]
    assert cut.note.startswith("2 flushes before DISC set aside as QEMU's own; if this was")
    assert cut.position == flushes[0]
    assert len(flushes) == 2
    source.close()


@pytest.mark.parametrize(
    ("at", "command"), [("reset", "system_reset"), ("powerdown", "system_powerdown")]
)
def test_the_cut_at_another_event_of_qemu(image: Path, at: str, command: str) -> None:
    folder = image.parent
    policy = folder / "mine.toml"
    policy.write_text(f'summary = "s"\nimitates = "i"\n[cache]\nholds = true\n[cut]\nat = "{at}"\n')
    options = ("--policy", policy, "--qmp", folder / "qmp-events")
    with serve(image, *options) as server, Qemu(folder, server.socket) as qemu:
        until(lambda: "listening to QMP" in server.log, "QMP is listened to")
        qemu.io("write -f -P 65 0 512")
        qemu.io("write -P 66 512 512")
        qemu.execute(command)
        assert server.wait() == 0, server.log
    assert sectors(image) == "A---"
    check_equality(image)
    assert (NoteKind.CUT, f"QEMU reported {at.upper()}") in notes(image)

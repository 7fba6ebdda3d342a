"""Sockets that somebody else bound first: none is believed, none gets a byte, none is removed.

As root the stranger is another user; without root only what a folder lets others do can be tried.
Not covered: TCP, where only TLS tells who is there (`tests/server/test_tls.py`).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nbdproxy.errors import UnsafeFolderError, UsageError
from nbdproxy.peers import TrustedPeers, user_number
from nbdproxy.server.front.endpoints import listen_unix
from tests.support.proxies import Proxy
from tests.support.serving import nbdproxy, until
from tests.support.strangers import NOBODY, lay_open, listening

SIZE = 64 * 1024
SHUTDOWN = b'{"event": "SHUTDOWN", "data": {"guest": true}}\n'
STRANGE = ("belongs to nobody", "of nobody", "is not safe")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder for a stranger's socket."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    return folder


def untouched(listener: socket.socket) -> bool:
    """Whether nobody who connected has said a word."""
    listener.settimeout(0.0)
    while True:
        try:
            connected, _ = listener.accept()
        except BlockingIOError:
            return True
        with connected:
            if select.select([connected], [], [], 0.2)[0] and connected.recv(1):
                return False


@pytest.mark.parametrize("option", ["--socket", "--control"])
def test_nothing_listens_in_a_folder_of_somebody_else(
    image: Path, theirs: Path, option: str
) -> None:
    path = lay_open(theirs) / "socket"
    told = nbdproxy("serve", image, option, path, "--run", "true", code=2).stderr
    assert "is not safe" in told
    assert not path.exists()


@pytest.mark.parametrize("command", ["timeline", "open"])
def test_states_are_not_served_there_either(image: Path, theirs: Path, command: str) -> None:
    run = image.parent / "run"
    nbdproxy("serve", image, "--record", run, "--run", "true")
    more = ("--at", "end") if command == "open" else ()
    path = lay_open(theirs) / "socket"
    assert "is not safe" in nbdproxy(command, run, *more, "--socket", path, code=2).stderr


@pytest.mark.parametrize("give_away", [True, False])
def test_a_strangers_monitor_is_not_believed(image: Path, theirs: Path, give_away: bool) -> None:
    run = image.parent / "run"
    with listening(theirs / "qmp", give_away=give_away) as stranger:
        options = ("--qmp", theirs / "qmp", "--record", run, "--policy", "cut-at-shutdown")
        with Proxy(image.parent / "proxy", image, *options) as server:
            until(lambda: "QMP is not listened to" in server.stderr, "it is said")
            assert any(words in server.stderr for words in STRANGE)
            with server.client() as client:
                client.write(0, b"A" * 512)
            assert untouched(stranger)
            server.signal(signal.SIGTERM)
            server.wait()
    assert nbdproxy("log", run, "--type", "qmp").stdout == ""


def test_the_monitor_of_a_user_who_was_named_is_believed(image: Path, theirs: Path) -> None:
    user = "nobody" if os.geteuid() == 0 else str(os.geteuid())
    run = image.parent / "run"
    with listening(theirs / "qmp", give_away=True) as qemu:
        lay_open(theirs)  # as /var/lib/libvirt/qemu is
        options = ("--qmp", theirs / "qmp", "--qmp-user", user, "--record", run)
        with Proxy(image.parent / "proxy", image, *options) as server:
            qemu.settimeout(20)
            monitor, _ = qemu.accept()
            with monitor:
                monitor.sendall(SHUTDOWN)
                with server.client() as client:
                    client.flush()
            assert server.stop() == 0
    assert "SHUTDOWN" in nbdproxy("log", run, "--type", "qmp").stdout


def test_a_user_who_is_not_there_is_told(image: Path, tmp_path: Path) -> None:
    words = ("serve", image, "--qmp", tmp_path / "qmp", "--qmp-user", "no-such-user")
    assert "there is no user 'no-such-user'" in nbdproxy(*words, code=2).stderr
    told = nbdproxy("serve", image, "--qmp-user", "root", code=2).stderr
    assert "--qmp-user is for --qmp" in told


@pytest.mark.parametrize("give_away", [True, False])
def test_a_strangers_server_below_gets_no_data(theirs: Path, give_away: bool) -> None:
    with listening(theirs / "below", give_away=give_away) as stranger:
        uri = f"nbd+unix:///?socket={theirs}/below"
        told = nbdproxy("serve", uri, "--run", "true", code=2).stderr
        assert any(words in told for words in STRANGE)
        assert untouched(stranger)


def test_a_server_below_of_a_user_who_was_named_is_used(image: Path, theirs: Path) -> None:
    user = "nobody" if os.geteuid() == 0 else str(os.geteuid())
    os.chmod(theirs, 0o755)  # noqa: PTH101 - its mode, and no more
    with Proxy(theirs / "proxy", image) as below:
        uri = f"nbd+unix:///?peer-user={user}&socket={below.socket}"
        done = nbdproxy("serve", uri, "--run", 'nbdinfo --size "$uri"')
    assert done.stdout == f"{SIZE}\n"


def test_ctl_does_not_take_a_strangers_word(theirs: Path) -> None:
    with listening(theirs / "ctl") as stranger:
        told = nbdproxy("ctl", theirs / "ctl", "pause", code=2).stderr
        assert any(words in told for words in STRANGE)
        assert untouched(stranger)


def test_an_abstract_socket_is_whose_who_binds_it(tmp_path: Path) -> None:
    """It has no folder, and so only who listens tells."""
    believed = TrustedPeers()
    name = f"\0nbdproxy-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(name)
        server.listen()
        client.connect(name)
        believed.check_listener(client, name)


def test_who_listens_is_asked_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without root: we are the stranger, and somebody else looks."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen()
        client.connect(str(path))
        TrustedPeers().check_path(path)
        TrustedPeers().check_listener(client, path)
        monkeypatch.setattr("nbdproxy.peers.is_trusted", lambda user: user == NOBODY)
        with pytest.raises(UnsafeFolderError, match="anybody may have put it there"):
            TrustedPeers().check_path(path)
        with pytest.raises(UnsafeFolderError, match="anybody may have put it there"):
            TrustedPeers().check_listener(client, path)
        named = TrustedPeers(user_number(str(os.geteuid())))
        named.check_path(path)
        named.check_listener(client, path)


def test_a_server_that_is_just_starting_is_not_taken_for_a_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has bound the path, and listens a moment later."""
    monkeypatch.setattr("nbdproxy.server.front.endpoints._STALE_S", 2.0)
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(str(tmp_path / "socket"))
        timer = threading.Timer(0.2, starting.listen)
        timer.start()
        with pytest.raises(UsageError, match="in use by another server"):
            listen_unix(tmp_path / "socket")
        timer.join()


def test_a_server_that_lets_nobody_in_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as full, ExitStack() as stack:
        full.bind(path)
        full.listen(0)
        for _ in range(3):  # until its queue is full
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(path)
        with pytest.raises(UsageError, match="in use by another server"):
            listen_unix(tmp_path / "socket")


def test_the_socket_of_a_newer_server_is_left_alone(image: Path, tmp_path: Path) -> None:
    path, second = tmp_path / "socket", tmp_path / "second"
    second.write_bytes(b"2" * SIZE)
    with Proxy(tmp_path, image, "--control", tmp_path / "ctl") as older:
        path.unlink()
        (tmp_path / "ctl").unlink()
        (tmp_path / "out").unlink()  # what the older one has said
        with Proxy(tmp_path, second, "--control", tmp_path / "ctl") as newer:
            assert older.stop() == 0
            with newer.client() as client:
                assert client.read(0, 1) == b"2"
            assert "power on" in nbdproxy("ctl", tmp_path / "ctl", "status").stdout
            assert newer.stop() == 0
        assert not path.exists()

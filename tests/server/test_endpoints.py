"""Where clients connect, and what `serve` was asked for: sockets, names, modes, commands.

Not covered: the requests themselves (`tests/nbd`), clients that misbehave (`test_patience.py`).
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support import nbd_client as nbd
from tests.support.nbd_client import NbdClient, NbdError
from tests.support.serving import COMMAND, Server, nbdproxy, tool, until

SIZE = 64 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"-" * SIZE)
    return path


def test_only_the_owner_may_use_the_socket(image: Path, tmp_path: Path) -> None:
    with Server(image, "--socket", tmp_path / "socket") as server:
        assert server.uri == f"nbd+unix:///?socket={tmp_path}/socket"
        mode = (tmp_path / "socket").stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600


def test_the_socket_is_gone_after_the_end(image: Path, tmp_path: Path) -> None:
    with Server(image, "--socket", tmp_path / "socket") as server:
        assert server.stop() == 0
        assert not (tmp_path / "socket").exists()


def test_without_a_socket_option_a_new_one_is_made_and_removed(image: Path) -> None:
    with Server(image) as server:
        path = Path(server.uri.partition("socket=")[2])
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert server.stop() == 0
        assert not path.parent.exists()


def test_port_0_finds_a_free_port_and_tells_it(image: Path) -> None:
    with Server(image, "--listen", "127.0.0.1:0") as server:
        host, _, port = server.uri.removeprefix("nbd://").removesuffix("/").partition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        with server.client() as client:
            client.write(0, b"A" * 512)
        assert server.stop() == 0
    assert image.read_bytes()[:512] == b"A" * 512


def test_ipv6_loopback_has_a_uri_that_clients_read(image: Path) -> None:
    with Server(image, "--listen", "[::1]:0") as server:
        assert server.uri.startswith("nbd://[::1]:")
        assert "size: 65536" in tool("nbdinfo", server.uri)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809", "example.org:1"])
def test_an_address_that_others_can_reach_is_refused(image: Path, address: str) -> None:
    told = nbdproxy("serve", image, "--listen", address, code=2).stderr
    assert "is not a loopback address" in told


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", ""])
def test_an_address_without_a_port_is_refused(image: Path, address: str) -> None:
    assert "is not HOST:PORT" in nbdproxy("serve", image, "--listen", address, code=2).stderr


def test_a_port_in_use_is_refused(image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert "in use" in nbdproxy("serve", image, "--listen", address, code=2).stderr


def test_a_stale_socket_is_replaced(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Server(image, "--socket", path) as server:
        server.kill()
    assert path.exists()
    with Server(image, "--socket", path) as server, server.client() as client:
        assert client.size == SIZE


def test_a_socket_in_use_is_refused_and_left_alone(image: Path, tmp_path: Path) -> None:
    path, second = tmp_path / "socket", tmp_path / "second"
    second.write_bytes(bytes(512))
    with Server(image, "--socket", path) as server:
        told = nbdproxy("serve", second, "--socket", path, code=2).stderr
        assert "in use by another server" in told
        with server.client() as client:
            assert client.size == SIZE


def test_a_file_in_the_sockets_place_is_left_alone(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    assert "not a socket" in nbdproxy("serve", image, "--socket", path, code=2).stderr
    assert path.read_text() == "data"


def test_a_socket_path_that_is_too_long_is_refused(image: Path, tmp_path: Path) -> None:
    told = nbdproxy("serve", image, "--socket", tmp_path / ("x" * 120), code=2).stderr
    assert "choose another --socket" in told


def test_an_image_in_use_by_another_proxy_is_refused(image: Path) -> None:
    with Server(image):
        told = nbdproxy("serve", image, "--run", "true", code=2).stderr
        assert "is in use by another nbdproxy" in told


def test_the_export_has_the_name_it_was_given(image: Path) -> None:
    with Server(image, "--export", "disk1") as server:
        with server.client("disk1") as client:
            assert client.size == SIZE
        with server.client("") as client:  # the default export
            assert client.size == SIZE
        with pytest.raises(ConnectionRefusedError, match="no export has this name"):
            server.client("disk2")


def test_what_the_export_tells_of_itself(image: Path) -> None:
    with Server(image) as server, server.client() as client:
        assert client.block_sizes == (1, 4096, 32 << 20)
        able = nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_ZERO | nbd.MULTI_CONN
        assert client.flags & able == able
        assert not client.flags & nbd.READ_ONLY
        assert "image" in client.description


def test_read_only_refuses_every_change_with_eperm(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    options = ("--read-only", "--record", tmp_path / "run")
    with Server(image, *options) as server, server.client() as client:
        assert client.flags & nbd.READ_ONLY
        changes = [client.write, client.zero, client.trim]
        arguments: list[object] = [b"A" * 512, 512, 512]
        for change, argument in zip(changes, arguments, strict=True):
            with pytest.raises(NbdError) as refused:
                change(0, argument)  # type: ignore[operator]
            assert refused.value.errno == nbd.EPERM
        client.flush()
        assert client.read(0, SIZE) == before
        client.disc()
        assert server.stop() == 0
    assert image.read_bytes() == before
    assert "refused     3" in nbdproxy("info", tmp_path / "run").stdout


@pytest.mark.parametrize("policy", ["passthrough", "drop-unflushed"])
def test_an_overlay_shows_the_writes_and_leaves_the_image(
    image: Path, tmp_path: Path, policy: str
) -> None:
    before, changed = image.read_bytes(), image.stat().st_mtime_ns
    options = ("--overlay", "--record", tmp_path / "run", "--policy", policy)
    with Server(image, *options) as server:
        with server.client() as client:
            client.write(0, b"A" * 4096)
            client.zero(8192, 512)
            client.trim(16384, 512)
            client.flush()
        with server.client() as client:
            assert client.read(0, 8192) == b"A" * 4096 + b"-" * 4096
            assert client.read(8192, 1024) == bytes(512) + b"-" * 512
            assert client.read(16384, 512) == bytes(512)
        assert server.stop() == 0
    assert image.read_bytes() == before
    assert image.stat().st_mtime_ns == changed
    nbdproxy("open", tmp_path / "run", "--at", "end", "-o", tmp_path / "state")
    assert (tmp_path / "state").read_bytes()[:4096] == b"A" * 4096


def test_several_clients_at_once_see_each_others_writes(image: Path) -> None:
    with Server(image) as server:
        clients = [server.client() for _ in range(8)]
        failures: list[str] = []

        def work(number: int, client: NbdClient) -> None:
            for turn in range(20):
                client.write(number * 4096, bytes([65 + number]) * 512)
                if client.read(number * 4096, 512) != bytes([65 + number]) * 512:
                    failures.append(f"client {number}, turn {turn}")
                client.flush()

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not failures
        for number in range(8):
            assert clients[-1 - number].read(number * 4096, 512) == bytes([65 + number]) * 512
        for client in clients:
            client.disc()
        assert server.stop() == 0


def run_command(image: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    return nbdproxy("serve", image, *options, "--run", command, code=None)


def test_run_sets_the_variables_and_owns_stdout(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    options = ("--socket", path, "--export", "disk1")
    done = run_command(image, 'echo "$uri|$socket|$export"', *options)
    assert done.stdout == f"nbd+unix:///disk1?socket={path}|{path}|disk1\n"
    assert done.returncode == 0


def test_run_over_tcp_has_no_socket(image: Path) -> None:
    done = run_command(image, 'echo "$uri|$socket|"; nbdinfo --size "$uri"', "--listen", "[::1]:0")
    first, second = done.stdout.splitlines()
    assert first.startswith("nbd://[::1]:")
    assert first.endswith("/||")
    assert second == str(SIZE)


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_run_ends_with_the_commands_exit_code(image: Path, command: str, code: int) -> None:
    assert run_command(image, command).returncode == code


def test_what_a_run_command_wrote_is_in_the_image(image: Path) -> None:
    done = run_command(image, 'qemu-io -f raw -c "write -P 65 0 512" "$uri"')
    assert done.returncode == 0
    assert image.read_bytes()[:513] == b"A" * 512 + b"-"


def test_a_signal_ends_the_run_command_too(image: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "serve", str(image), "--run", f"echo $$ > {tmp_path}/pid; exec sleep 60"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        pid_file = tmp_path / "pid"
        until(lambda: pid_file.exists() and pid_file.read_text() != "", "the command runs")
        process.send_signal(signal.SIGINT)
        process.wait(10)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)
    finally:
        process.kill()
        process.wait(10)


def test_a_failed_command_is_still_a_cut(image: Path) -> None:
    command = 'qemu-io -f raw -t unsafe -c "write -P 65 0 512" "$uri" && kill -9 $$'
    done = run_command(image, command, "--policy", "unsafe")
    assert done.returncode == 137
    assert "power cut" in done.stderr
    assert image.read_bytes() == b"-" * SIZE


def test_an_image_that_is_removed_meanwhile_costs_the_recording_nothing(
    image: Path, tmp_path: Path
) -> None:
    nbdproxy("serve", image, "--record", tmp_path / "run", "--run", f"rm {image}")
    assert "the command ended" in nbdproxy("info", tmp_path / "run").stdout

"""`nbdproxy serve` with several exports, and what it says to images and URIs that it cannot use.

Not covered: what goes over the wire (`tests/server`), and single images (`test_bad_input.py`).
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.support.lower import nbdkit
from tests.support.nbd_client import FUA, NbdClient
from tests.support.proxies import MIB, Proxy
from tests.support.serving import nbdproxy, tool

SIZE = 65536


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three disks of different sizes and contents."""
    paths = [tmp_path / name for name in ("root.img", "data.img", "swap.img")]
    for number, path in enumerate(paths, 1):
        path.write_bytes(str(number).encode() * number * SIZE)
    return paths


def refusal(*words: str | Path) -> str:
    """The one sentence with which `serve` refuses."""
    done = nbdproxy("serve", *words, "--run", "true", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("nbdproxy: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("nbdproxy: ")


def test_several_images_are_several_exports(images: list[Path], tmp_path: Path) -> None:
    with Proxy(tmp_path / "proxy", *images, exports=3) as proxy:
        names = [path.name for path in images]
        at = f"?socket={proxy.socket}"
        assert proxy.uris == [f"nbd+unix:///{name}{at}" for name in names]
        told = json.loads(tool("nbdinfo", "--list", "--json", proxy.uri))["exports"]
        assert [(one["export-name"], one["export-size"]) for one in told] == [
            (name, number * SIZE) for number, name in enumerate(names, 1)
        ]
        for number, uri in enumerate(proxy.uris, 1):
            with NbdClient(uri) as client:
                assert client.read(0, number * SIZE) == str(number).encode() * number * SIZE
                client.write(0, b"A" * 512 * number)
                client.flush()
        with proxy.client("") as client:  # the default is the first
            assert client.size == SIZE
        with pytest.raises(ConnectionRefusedError):
            proxy.client("nope")
        assert proxy.stop() == 0
        assert proxy.stderr.count("serving ") == 3
        assert proxy.stderr.count("ended by SIGTERM: 1 write") == 3
    for number, path in enumerate(images, 1):
        count = 512 * number
        expected = b"A" * count + str(number).encode() * (number * SIZE - count)
        assert path.read_bytes() == expected


def test_exports_have_the_names_they_were_given(images: list[Path], tmp_path: Path) -> None:
    """In the images' order; a name may have a slash, a space or an umlaut in it."""
    names = ["a/b", "my disk", "größe"]
    words = [word for name in names for word in ("--export", name)]
    with Proxy(tmp_path / "proxy", *images, *words, exports=3) as proxy:
        assert [uri.partition("?")[0] for uri in proxy.uris] == [
            *("nbd+unix:///a%2Fb", "nbd+unix:///my%20disk", "nbd+unix:///gr%C3%B6%C3%9Fe"),
        ]
        for number, uri in enumerate(proxy.uris, 1):
            assert tool("nbdinfo", "--size", uri) == f"{number * SIZE}\n"


def test_kinds_of_images_can_be_mixed(images: list[Path], tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1M") as below:
        names = ("--export", "disk", "--export", "memory")
        with Proxy(tmp_path / "proxy", images[0], below.uri, *names, exports=2) as proxy:
            assert [NbdClient(uri).size for uri in proxy.uris] == [SIZE, MIB]


def test_each_export_has_its_own_recording(images: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Proxy(tmp_path / "proxy", *images[:2], "--record", run, exports=2) as proxy:
        for number, uri in enumerate(proxy.uris):
            with NbdClient(uri) as client:
                for turn in range(number + 1):
                    client.write(turn * 512, b"A" * 512)
        assert proxy.stop() == 0
    assert sorted(path.name for path in run.iterdir()) == ["data.img", "root.img"]
    for number, image in enumerate(images[:2], 1):
        told = json.loads(nbdproxy("info", run / image.name, "--json").stdout)
        assert told["image"] == str(image)
        assert told["requests"]["write"]["count"] == number
        assert told["connections"] == 1
        assert told["ended"] == "ended by SIGTERM"
        nbdproxy("open", run / image.name, "--at", "end", "-o", tmp_path / "state")
        assert (tmp_path / "state").read_bytes() == image.read_bytes()
        (tmp_path / "state").unlink()


@pytest.mark.parametrize("policy", ["drop-unflushed", "cut-at-shutdown"])
def test_a_cut_takes_all_exports(images: list[Path], tmp_path: Path, policy: str) -> None:
    """At a signal, or when the client of one of them leaves: there is one power supply."""
    before = [path.read_bytes() for path in images]
    options = ("--policy", policy, "--record", tmp_path / "run")
    with Proxy(tmp_path / "proxy", *images, *options, exports=3) as proxy:
        clients = [NbdClient(uri) for uri in proxy.uris]
        for client in clients:
            client.write(0, b"A" * 512)
            client.flush()
            client.write(512, b"B" * 512)
            client.write(1024, b"C" * 512, FUA)
        if policy == "cut-at-shutdown":
            clients[1].drop()
        else:
            proxy.signal(15)
        assert proxy.wait() == 0
        for client in clients:
            client.drop()
        assert proxy.stderr.count("power cut: 512 B") == 3
    for path, content in zip(images, before, strict=True):
        expected = b"A" * 512 + content[512:1024] + b"C" * 512 + content[1536:]
        assert path.read_bytes() == expected
        told = nbdproxy("info", tmp_path / "run" / path.name).stdout
        assert "cut" in told


def test_one_lost_export_ends_them_all(images: list[Path], tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1M") as below:
        names = ("--export", "disk", "--export", "memory", "--record", tmp_path / "run")
        with Proxy(tmp_path / "proxy", images[0], below.uri, *names, exports=2) as proxy:
            with NbdClient(proxy.uris[0]) as client:
                client.write(0, b"A" * 512)
            below.kill()
            assert proxy.wait() == 2
            assert f"the NBD server of {below.uri} is lost" in proxy.sentence
    assert images[0].read_bytes()[:512] == b"A" * 512
    for name in ("disk", "memory"):
        assert "is lost" in nbdproxy("info", tmp_path / "run" / name).stdout


def test_run_is_told_of_the_first_export(images: list[Path], tmp_path: Path) -> None:
    command = 'echo "$export"; nbdinfo --size "$uri"'
    assert nbdproxy("serve", *images, "--run", command).stdout == f"root.img\n{SIZE}\n"


def test_an_image_that_cannot_be_opened_leaves_nothing_behind(
    images: list[Path], tmp_path: Path
) -> None:
    """The recording of the one before it is complete, and says how it ended."""
    run = tmp_path / "run"
    said = refusal(images[0], tmp_path / "nothing", "--record", run)
    assert "there is no image at" in said
    assert not (run / "nothing").exists()
    assert "ended" in nbdproxy("info", run / "root.img").stdout
    with Proxy(tmp_path / "proxy", images[0]) as proxy:
        assert tool("nbdinfo", "--size", proxy.uri) == f"{SIZE}\n"


def test_names_and_images_must_be_as_many(images: list[Path]) -> None:
    assert "2 images and 1 name do not match" in refusal(*images[:2], "--export", "a")
    two = ("--export", "a", "--export", "b")
    assert "1 image and 2 names" in refusal(images[0], *two)


def test_two_exports_of_one_name_are_refused(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "root.img"
    twin.write_bytes(bytes(SIZE))
    assert "two exports would be called 'root.img'" in refusal(images[0], twin)
    same = ("--export", "a", "--export", "a")
    assert "two exports would be called 'a'" in refusal(*images[:2], *same)


def test_one_image_is_not_served_twice(images: list[Path]) -> None:
    names = ("--export", "a", "--export", "b")
    assert "is in use by another nbdproxy" in refusal(images[0], images[0], *names)


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_a_name_that_is_no_folder_cannot_be_recorded(
    images: list[Path], tmp_path: Path, name: str
) -> None:
    names = ("--export", name, "--export", "b", "--record", tmp_path / "run")
    assert f"a recording's folder cannot be called {name!r}" in refusal(*images[:2], *names)
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_too_long_is_refused(images: list[Path]) -> None:
    assert "at most 4096 bytes" in refusal(images[0], "--export", "x" * 4097)


URIS = {
    "nbd:unix:/tmp/socket": "no NBD URI that can be used",
    "nbd+unix:///": "add ?socket=PATH",
    "nbd+unix://host/?socket=/tmp/s": "a Unix socket has no host",
    "nbd://localhost:0": "'0' is no port",
    "nbd://localhost:99999": "'99999' is no port",
    "nbd+vsock://1/": "it has to begin with",
    "nbds://localhost/?tls-type=psk": "only TLS with certificates",
    "nbd://localhost/?tls-certificates=/tmp": "write nbds:",
    "nbd+unix:///?socket=/nowhere/socket": "nobody listens there",
    "nbd+unix:///?socket=/nowhere/a b": "cannot stand in a URI",
    "nbds+unix:///?socket=/nowhere/socket&tls-certificates=/nowhere": "nobody listens there",
}


@pytest.mark.parametrize(("uri", "told"), URIS.items())
def test_a_uri_that_cannot_be_used_is_refused_with_a_reason(uri: str, told: str) -> None:
    assert told in refusal(uri)


def test_a_port_where_nobody_listens_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = refusal(f"nbd://127.0.0.1:{port}")
    assert "cannot be used" in said


def test_an_export_that_the_server_does_not_have_is_told(
    images: list[Path], tmp_path: Path
) -> None:
    with Proxy(tmp_path / "lower", *images[:2], exports=2) as below:
        said = refusal(f"nbd+unix:///nope?socket={below.socket}")
        assert 'the server has no export "nope"' in said
        uri = f"nbd+unix:///data.img?socket={below.socket}"
        with Proxy(tmp_path / "upper", uri) as proxy, proxy.client() as client:
            assert client.size == 2 * SIZE


def test_the_help_shows_all_this() -> None:
    told = nbdproxy("serve", "--help").stdout
    for option in ("--tls ", "--tls-certificates", "--tls-verify-peer", "--insecure", "--format"):
        assert option in told
    for example in ("IMAGE...", "NBD URI", "nbd+unix:///?socket=", "--export root --export data"):
        assert example in told

"""Crash states under other people's programs: libnbd's tools and QEMU's, by URI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_timeline import SIZE, Served, Simple, opened, record_simple, seqs_of
from tests.support.serving import tool
from tests.support.shell import nbdsh


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Simple:
    """A recording of three writes. Nobody may change it."""
    return record_simple(tmp_path_factory.mktemp("simple"))


@pytest.fixture
def served(simple: Simple, tmp_path: Path) -> object:
    """All its states, on a socket whose name has to be quoted in a URI."""
    with Served(simple.run, "--socket", tmp_path / "a socket") as running:
        yield running


def state_of(simple: Simple) -> str:
    """A state without B."""
    events = max(seqs_of(simple)) + 1
    return f"s{events}.flushed.but{seqs_of(simple)[1]}"


def test_qemu_img_reads_a_state(simple: Simple, served: Served, tmp_path: Path) -> None:
    for name, choice in (
        (state_of(simple), ("--state", state_of(simple))),
        ("mark:ready", ("--at", "mark:ready")),
    ):
        out = tmp_path / "out"
        tool("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri(name), out)
        assert out.read_bytes() == opened(simple, tmp_path, *choice)
        told = json.loads(tool("qemu-img", "info", "-f", "raw", "--output=json", served.uri(name)))
        assert told["virtual-size"] == SIZE
        mapped = tool("qemu-img", "map", "-f", "raw", "--output=json", served.uri(name))
        data = [piece for piece in json.loads(mapped) if not piece["zero"]]
        held = sum(piece["length"] for piece in data)
        assert 4096 <= held < SIZE, "holes are told as holes"


def test_qemu_io_writes_to_a_state_and_it_is_forgotten(simple: Simple, served: Served) -> None:
    uri = served.uri(state_of(simple))
    steps = ["write -P 0x5a 8192 1024", "flush", "read -P 0x5a 8192 1024", "read -P 0x41 0 4096"]
    words = [word for step in steps for word in ("-c", step)]
    said = tool("qemu-io", "-f", "raw", *words, uri)
    assert "failed" not in said
    assert said.count("read ") == 2
    again = tool("qemu-io", "-f", "raw", "-c", "read -P 0 8192 1024", uri)
    assert "failed" not in again


def test_qemu_img_compares_two_states(simple: Simple, served: Served) -> None:
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw")
    tool(*compare, served.uri("end"), served.uri("before-exit"))
    said = tool(*compare, served.uri("end"), served.uri(state_of(simple)), code=1)
    assert "8192" in said


def test_nbdcopy_over_several_connections(simple: Simple, served: Served, tmp_path: Path) -> None:
    """Each of its connections is a state of its own, and all of them the same."""
    out = tmp_path / "out"
    tool("nbdcopy", "--connections=4", "--requests=16", served.uri(state_of(simple)), out)
    assert out.read_bytes() == opened(simple, tmp_path, "--state", state_of(simple))


def test_a_state_promises_one_client_only_what_it_holds(simple: Simple, served: Served) -> None:
    """Overlays are private, so a flush on one connection says nothing of another's writes."""
    told = nbdsh(
        """
        one, other = nbd.NBD(), nbd.NBD()
        for each in (one, other):
            each.connect_uri(URI)
        one.pwrite(b"x" * 512, 0)
        one.flush()
        tell([other.pread(512, 0).hex()[:2],
              one.can_multi_conn()])
        """.replace("URI", repr(served.uri("end")))
    )
    assert told == ["41", False]


def test_nbdinfo_lists_every_cut_and_tells_the_state(simple: Simple, served: Served) -> None:
    said = tool("nbdinfo", "--list", served.uri(""))
    for name in ("end", "before-exit", "riskiest", "mark:ready"):
        assert f'export="{name}"' in said
    assert "s" in tool("nbdinfo", served.uri(state_of(simple)))
    mapped = json.loads(tool("nbdinfo", "--map", "--json", served.uri("mark:ready")))
    assert sum(piece["length"] for piece in mapped) == SIZE
    assert mapped[0]["type"] == 0
    assert mapped[-2]["type"] == 3, "a hole is told as a hole"

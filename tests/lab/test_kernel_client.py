"""The Linux kernel's own NBD client, in a guest, against nbdproxy on the host.

nbd-client opens the connections, the kernel's nbd driver does the rest: ext4 on /dev/nbd0, several
processes that change it at once, everything checked in the guest and again on the host.

Not covered: TLS, servers that end while a guest is connected, and reconnecting.
"""

from __future__ import annotations

import filecmp
import json
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.errors import LabError
from nbdproxy.lab import run as guest
from nbdproxy.lab.guest import disk
from nbdproxy.lab.guest.build import Lab, build_lab
from nbdproxy.lab.workloads import stress, workloads
from nbdproxy.recording.reader import Recording
from nbdproxy.requests import Command
from tests.support.serving import Server, nbdproxy, tool

pytestmark = pytest.mark.lab

MIB = 1 << 20
CONNECTIONS = 4
LISTEN = ("--listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def lab() -> Lab:
    return build_lab()


def test_ext4_under_load_over_four_connections(lab: Lab, tmp_path: Path) -> None:
    """With drop-unflushed, a flush on one connection has to cover the writes of all of them."""
    image, recording, state = tmp_path / "disk.img", tmp_path / "run", tmp_path / "state"
    workload = replace(workloads.workload_named("stress"), mount_options="discard")
    disk.format_disk(image, workload.disk_mib * MIB)
    options = (*LISTEN, "--record", recording, "--policy", "drop-unflushed")
    with Server(image, *options) as server:
        run = guest.run(
            lab,
            workload,
            server.uri,
            device="nbd",
            connections=CONNECTIONS,
            cpus=CONNECTIONS,  # the kernel has one queue for a connection, and a CPU keeps to one
            time_limit_s=200,
        )
        assert server.stop() == 0
    assert "rror" not in run.serial
    assert "timed out" not in run.serial
    tool("e2fsck", "-fn", image)
    _check_files(image, tmp_path / "files")
    _check_requests(recording)
    nbdproxy("open", recording, "--at", "end", "-o", state)
    assert filecmp.cmp(image, state, shallow=False)


def _check_files(image: Path, into: Path) -> None:
    """The host, too, finds the files that the guest listed."""
    into.mkdir()
    tool("debugfs", "-R", f"rdump / {into}", image)
    assert len((into / stress.DIGESTS).read_text().splitlines()) > 50
    tool("sh", "-c", f"cd '{into}' && sha256sum --check --strict --quiet {stress.DIGESTS}")


def _check_requests(recording: Path) -> None:
    """Every connection wrote, and all that was asked for was answered without an error."""
    facts = json.loads(nbdproxy("info", recording, "--verify", "--json").stdout)
    assert facts["ended"] == "ended by SIGTERM"
    assert facts["missing"] is None
    assert facts["refused"] == 0
    requests = facts["requests"]
    assert {"write", "flush", "trim"} <= set(requests)
    assert requests["write"]["fua"] > 0
    assert all(counted["failed"] == counted["unanswered"] == 0 for counted in requests.values())
    table = Recording(recording).table
    assert len(set(table.connection[table.command == Command.WRITE].tolist())) == CONNECTIONS


def test_a_partition_of_an_export_with_a_name(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    disk.format_disk(image, 32 * MIB, partition_table="gpt")
    with Server(image, *LISTEN, "--export", "disk one") as server:
        run = guest.run(
            lab,
            workloads.shell("grep -w /mnt /proc/mounts"),
            server.uri,
            ending=workloads.parse_ending("umount"),
            device="nbd",
            partition=1,
        )
    assert "/dev/nbd0p1 /mnt ext4" in run.serial


@pytest.mark.parametrize(
    "uri",
    [
        "disk.img",
        "nbd+unix:///?socket=sock",
        "nbd://192.0.2.1/",
        "nbds://127.0.0.1/",
    ],
)
def test_servers_that_the_guest_cannot_reach_are_told(lab: Lab, uri: str) -> None:
    with pytest.raises(LabError, match=r"--listen 127\.0\.0\.1:0"):
        guest.run(lab, workloads.shell("true"), uri, device="nbd")


def test_a_lab_without_nbd_client_tells_how_to_get_it(lab: Lab) -> None:
    without = replace(lab, programs=lab.programs - {"nbd-client"})
    with pytest.raises(LabError, match="apt-get install nbd-client"):
        guest.run(without, workloads.shell("true"), "nbd://127.0.0.1/", device="nbd")

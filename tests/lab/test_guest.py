"""Real guests: what the lab promises its callers, seen on the disk afterwards."""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path

import pytest

from nbdproxy.errors import LabError
from nbdproxy.lab import run as guest
from nbdproxy.lab.guest import accel, disk, tools
from nbdproxy.lab.guest.build import Lab, build_lab
from nbdproxy.lab.workloads import workloads

pytestmark = pytest.mark.lab

MIB = 1 << 20


@pytest.fixture(scope="module")
def lab() -> Lab:
    return build_lab()


def _files(image: Path, into: Path) -> dict[str, bytes]:
    """Every regular file of an image, read without the kernel."""
    debugfs = tools.require(["debugfs"])["debugfs"]
    into.mkdir()
    subprocess.run([debugfs, "-R", f"rdump / {into}", image], check=True, capture_output=True)
    return {
        f"/{path.relative_to(into)}": path.read_bytes()
        for path in into.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_what_is_synced_is_whole(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    workload = workloads.workload_named("tar-small")
    disk.format_disk(image, workload.disk_mib * MIB)
    said: list[str] = []
    run = guest.run(
        lab,
        workload,
        image,
        ending=workloads.parse_ending("sync"),
        on_line=said.append,
    )
    assert run.exit_status == 0
    assert 0 < run.started_s < run.finished_s < run.ended_s
    assert "@lab ending" in said
    found = _files(image, tmp_path / "files")
    lines = lab.manifests["small"].read_text().splitlines()
    expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    assert len(expected) > 600
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == expected


def test_a_killed_qemu_on_nvme_in_a_partition(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk,with comma.img"
    disk.format_disk(image, 32 * MIB, partition_table="gpt")
    qmp = tmp_path / "qmp"
    seen: list[bool] = []
    run = guest.run(
        lab,
        workloads.shell("echo synced > a; sync; echo forgotten > b; printf half"),
        image,
        ending=workloads.parse_ending("hang"),
        device="nvme",
        partition=1,
        cache_mode="none",
        qmp=qmp,
        on_line=lambda _line: seen.append(qmp.is_socket()),
    )
    assert run.exit_status == -9
    assert all(seen)
    bare = tmp_path / "partition.img"
    bare.write_bytes(image.read_bytes()[disk.PARTITION_START : -disk.PARTITION_START])
    subprocess.run(
        [tools.require(["e2fsck"])["e2fsck"], "-y", "-E", "journal_only", bare],
        check=False,
        capture_output=True,
    )
    assert _files(bare, tmp_path / "files") == {"/a": b"synced\n"}


def test_a_workload_that_fails_is_an_error(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    disk.format_disk(image, 32 * MIB)
    with pytest.raises(LabError, match=r"(?s)with status 7.*cannot do this"):
        guest.run(
            lab,
            workloads.shell("echo cannot do this; exit 7"),
            image,
        )


def test_a_guest_out_of_time_is_ended(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    disk.format_disk(image, 32 * MIB)
    began = time.monotonic()
    with pytest.raises(LabError, match="not done after 1 s"):
        guest.run(lab, workloads.shell("true"), image, accelerator="tcg", time_limit_s=1)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("wrong", [{"cache_mode": "best"}, {"device": "floppy"}])
def test_what_qemu_does_not_have_is_told(lab: Lab, tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(LabError, match=r"QEMU has|the lab has"):
        guest.run(lab, workloads.shell("true"), tmp_path / "disk.img", **wrong)  # type: ignore[arg-type]


def test_a_boot_is_seen_and_a_hang_is_not_taken_for_one(lab: Lab) -> None:
    assert accel.boots(lab.kit, accel.TCG, 60)
    assert not accel.boots(lab.kit, accel.TCG, 0.3)

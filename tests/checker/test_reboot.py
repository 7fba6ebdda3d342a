"""What a machine's own reboot would bring back: logs, fast commits, and what was deleted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.lab.guest.disk import format_disk
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Fsck
from nbdproxy.oracles.mounts import ONLY
from nbdproxy.oracles.quick import QUICK
from tests.support.states import cut_off, files, opened

pytestmark = pytest.mark.lab

SIZE = 320 << 20
SYNCED_ALONE = "echo 1 > a; sync; echo 2 | dd of=b conv=fsync"
OPEN_AND_DELETED = (
    "echo 1 > a; sleep 999 < a & sleep 0.1; echo 2 > b; rm a; sync; kill $!; wait || true"
)
MANIFEST = files(a=b"1\n", b=b"2\n")


@pytest.mark.parametrize(
    ("fs", "options"),
    [
        ("ext4", ()),
        ("ext4", ("-O", "fast_commit")),
        ("ext4", ("-O", "quota")),
        ("ext3", ()),
        ("xfs", ()),
        ("btrfs", ()),
    ],
)
def test_a_file_that_was_synced_alone_is_there(
    kernel: KernelOracle, tmp_path: Path, fs: str, options: tuple[str, ...]
) -> None:
    format_disk(tmp_path / "image", SIZE, fs=fs, options=options)
    disk = cut_off(kernel, tmp_path / "image", SYNCED_ALONE)
    found = kernel.prepare_check(MANIFEST, earlier={}, mount=ONLY).check(disk, None)
    assert found.conditions == {"/a": Condition.WHOLE, "/b": Condition.WHOLE}
    examined = kernel.examine(disk, partition=None)
    assert examined.mounts and examined.replayed
    assert isinstance(examined.fsck, Fsck) and examined.fsck.clean, examined.fsck


@pytest.mark.parametrize("fs", ["ext4", "xfs", "btrfs"])
def test_what_was_deleted_while_it_was_open_is_cleared_up(
    kernel: KernelOracle, tmp_path: Path, fs: str
) -> None:
    format_disk(tmp_path / "image", SIZE, fs=fs)
    disk = cut_off(kernel, tmp_path / "image", OPEN_AND_DELETED)
    found = kernel.prepare_check(MANIFEST, earlier={}, mount=ONLY).check(disk, None)
    assert found.conditions == {"/a": Condition.MISSING, "/b": Condition.WHOLE}
    examined = kernel.examine(disk, partition=None)
    assert isinstance(examined.fsck, Fsck) and examined.fsck.clean, examined.fsck


def test_what_the_replay_changes_has_nothing_of_the_mount_s_own(
    kernel: KernelOracle, tmp_path: Path
) -> None:
    """Nothing at all where there is nothing to replay; else what the quick oracle says, too."""
    for fs in ("ext4", "btrfs", "vfat"):
        format_disk(tmp_path / fs, SIZE, fs=fs, options=["-b", "4096"] if fs == "ext4" else [])
        assert kernel.examine(opened(tmp_path / fs), partition=None).replayed == ()
    disk = cut_off(kernel, tmp_path / "ext4", SYNCED_ALONE)
    real, quick = (o.examine(disk, partition=None, fsck=False) for o in (kernel, QUICK))
    told, more = (
        {at for e in one.replayed for at in range(e.offset // 4096, -(-e.end // 4096))}
        for one in (quick, real)
    )
    assert told and told <= more
    words = ["debugfs", "-R", "blocks <8>", str(tmp_path / "ext4")]
    journal = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert more - told <= {0, *map(int, journal.split())}


def test_a_filesystem_that_wants_a_panic_gets_none(kernel: KernelOracle, tmp_path: Path) -> None:
    """One file is lost with its inode; the guest, and the other file, are still there."""
    (tmp_path / "root").mkdir()
    for name, content in (("a", "1\n"), ("b", "2\n")):
        (tmp_path / "root" / name).write_text(content)
    image = tmp_path / "image"
    format_disk(image, SIZE, options=["-e", "panic", "-d", str(tmp_path / "root")])
    subprocess.run(["debugfs", "-w", "-R", "clri /a", image], check=True, capture_output=True)
    found = kernel.prepare_check(MANIFEST, earlier={}, mount=ONLY).check(opened(image), None)
    assert found.conditions == {"/a": Condition.UNREADABLE, "/b": Condition.WHOLE}

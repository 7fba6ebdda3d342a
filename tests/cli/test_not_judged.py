"""A part of a guest that cannot be judged: nothing is said to be well, or lost, for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdproxy.oracles.manifest import dump
from tests.support.nbd_client import FUA, WRITE, NbdClient, Op
from tests.support.proxies import Proxy
from tests.support.serving import nbdproxy, tool
from tests.support.systems import LUKS, MIB, Part, disk, manifest

BLOCK = 4096
FSTAB = "LABEL=root / ext4 defaults 0 1\nLABEL=home /home ext4 defaults 0 2\n"
SYSTEM = {"/etc/passwd": "users\n"}
HOME = {"/home/u.txt": "mine\n"}


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The system's disk, and that of /home."""
    folder = tmp_path_factory.mktemp("disks")
    root = Part({"/etc/fstab": FSTAB, **SYSTEM}, "root", folders=("/home",))
    home = Part({"/u.txt": HOME["/home/u.txt"]}, "home")
    return disk(folder / "system", root), disk(folder / "home", home, first=5)


def recorded(folder: Path, after: tuple[bytes, bytes], before: bytes, flags: int) -> Path:
    """Record a guest that writes both disks, the first with some flags, and flushes that one."""
    images = [folder / "system.img", folder / "home.img"]
    start = (bytes(len(after[0])), before)
    for image, content in zip(images, start, strict=True):
        image.write_bytes(content)
    with Proxy(folder / "proxy", *images, "--record", folder / "run", exports=2) as proxy:
        for uri, old, new, flag in zip(proxy.uris, start, after, (flags, 0), strict=True):
            client = NbdClient(uri)
            ops = [
                Op(WRITE, at, data=new[at : at + BLOCK], flags=flag)
                for at in range(0, len(new), BLOCK)
                if new[at : at + BLOCK] != old[at : at + BLOCK]
            ]
            assert not any(reply.error for reply in client.do(*ops))
            if uri == proxy.uri:
                client.flush()
            client.disc()
        assert proxy.stop() == 0
    (folder / "files").write_text(dump(manifest({**SYSTEM, **HOME})))
    return folder / "run"


def test_files_of_a_disk_that_cannot_be_judged_cannot_be_told(
    disks: tuple[bytes, bytes], tmp_path: Path
) -> None:
    before = bytearray(disks[1])
    before[MIB : MIB + BLOCK] = b"junk" * (BLOCK // 4)  # in place of the superblock
    run = recorded(tmp_path, disks, bytes(before), flags=0)
    cell = ("--mode", "none", "--failure", "host-power-loss", "--recorded-as", "none")
    words = ("replay", run / "system.img", run / "home.img", "--files", tmp_path / "files", *cell)
    said = nbdproxy(*words, "--list", code=2).stdout
    assert said.splitlines()[0].split() == [*cell[1:4:2], "cannot-be-told", "-", "/home/u.txt"]
    assert "│ 1 of 2 whole " in said  # no markup
    assert "as far as can be told nobody's; what became of 1 of 2 files cannot be told" in said


def test_recordings_without_a_mode_in_common_are_no_empty_table(
    disks: tuple[bytes, bytes], tmp_path: Path
) -> None:
    (tmp_path / "raw").write_bytes(disks[1])
    tool("qemu-img", "convert", "-O", "qcow2", tmp_path / "raw", tmp_path / "qcow2")
    below = (tmp_path / "qcow2").read_bytes()
    run = recorded(tmp_path, (disks[0], below), bytes(len(below)), flags=FUA)
    words = ("replay", run / "system.img", run / "home.img", "--files", tmp_path / "files")
    said = nbdproxy(*words, code=2).stderr
    assert "these recordings have no cache mode in common" in said
    assert "every write carries FUA" in said and "below qcow2" in said
    assert "--recorded-as" in said


def test_what_may_be_in_something_unread_is_not_missed(tmp_path: Path) -> None:
    image, files = tmp_path / "disk.img", tmp_path / "files"
    image.write_bytes(disk(tmp_path / "disk", Part(SYSTEM), Part(raw=LUKS)))
    files.write_text(dump(manifest(HOME)))
    said = nbdproxy("check", image, "--files", files, "--no-fsck", code=2).stdout
    assert "1 cannot-be-told" in said and "partition 2 is LUKS1" in said
    said = nbdproxy("check", image, "--files", files, "--partition", "1", "--list", code=1).stdout
    assert "missing        /home/u.txt" in said  # all are on that one: so it was said
    said = nbdproxy("extract", image, "/home/u.txt", "-o", tmp_path / "one", code=2).stdout
    assert "unknown  /home/u.txt: it is not there, but perhaps in what cannot be read" in said
    words = ("extract", image, "/home/u.txt", "--mount", "1:/", "-o", tmp_path / "two")
    assert "lost     /home/u.txt: it is not there" in nbdproxy(*words, code=1).stdout


def test_a_command_is_told_what_its_folder_lacks(
    disks: tuple[bytes, bytes], tmp_path: Path
) -> None:
    run = recorded(tmp_path, disks, bytes(len(disks[1])), flags=0) / "system.img"
    words = ("explore", run, "--at", "end", "--states", "1", "--workers", "1")
    done = nbdproxy(*words, "--check", 'test -e "$dir/etc/passwd"', code=None)
    assert "note: not in $dir is what cannot be read: /home is on LABEL=home" in done.stderr

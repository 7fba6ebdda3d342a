"""A real kernel's word on real filesystems; one guest for all of it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nbdproxy.checker.guest import GuestError
from nbdproxy.checker.oracle import KernelOracle
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import FilesystemError
from nbdproxy.lab.guest.disk import format_disk
from nbdproxy.oracles.check import Findings, PartlyListedError, Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.examine import Fsck
from nbdproxy.oracles.ext4.filesystem import ROOT, Filesystem
from nbdproxy.oracles.filesystems import kind_of
from nbdproxy.oracles.globs import matcher
from nbdproxy.oracles.locate import Where, locate
from nbdproxy.oracles.manifest import DIGITS, Entry, Manifest, digest, link_entry
from nbdproxy.oracles.mounts import ONLY, Mount, Tree
from nbdproxy.oracles.quick import QUICK
from tests.support import conditions, places
from tests.support.states import opened

pytestmark = pytest.mark.lab

MIB = 320  # the least that mkfs.xfs takes
SIZE = MIB << 20
FIRST_RECORD = 64  # in NTFS, of a file that is not the filesystem's own
CLUSTERS = bytes(range(256)) * 32


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> conditions.Shown:
    return conditions.make(tmp_path_factory.mktemp("ext4"), f"{MIB}M")


def one_file(content: bytes, path: str = "/a") -> Manifest:
    return Manifest((Entry(path, digest([content]), len(content)),))


def test_it_says_what_the_quick_one_says_of_every_condition(
    kernel: KernelOracle, shown: conditions.Shown
) -> None:
    disk = opened(shown.image)
    modes = (0o644, 0o755)
    whole = next(e for e in shown.manifest.entries if e.path.endswith("/whole"))
    for oracle in (kernel, QUICK):
        follower = oracle.prepare_check(shown.manifest, earlier=shown.earlier, mount=ONLY)
        assert follower.check(disk, None) == Findings(Verdict.FAIL, shown.expected)
        found: list[Condition] = []
        for mode in modes:
            wanted = Manifest((replace(whole, mode=mode),))
            follower = oracle.prepare_check(wanted, earlier={}, mount=ONLY)
            found += follower.check(disk, None).conditions.values()
        assert found == [Condition.WHOLE, Condition.DAMAGED]


@pytest.mark.parametrize("is_guessed", [False, True])
@pytest.mark.parametrize("algorithm", sorted(DIGITS))
def test_every_digest_tells_every_condition(
    kernel: KernelOracle, shown: conditions.Shown, algorithm: str, *, is_guessed: bool
) -> None:
    other = digest([conditions.CONTENT], algorithm)
    name = "sha512" if is_guessed and DIGITS[algorithm] == 128 else algorithm
    wanted = Manifest(
        tuple(
            e
            if e.target is not None
            else replace(e, digest=other, algorithm=name, is_guessed=is_guessed)
            for e in shown.manifest.entries
        )
    )
    for oracle in (kernel, QUICK):
        follower = oracle.prepare_check(wanted, earlier=shown.earlier, mount=ONLY)
        found = follower.check(opened(shown.image), None)
        assert found == Findings(Verdict.FAIL, shown.expected)


def test_nothing_of_the_state_before_is_seen(kernel: KernelOracle, shown: conditions.Shown) -> None:
    """The same file at the same place with another byte: the guest must not have kept it."""
    disk = opened(shown.image)
    filesystem = Filesystem(disk)
    node = filesystem.lookup(f"{conditions.UNDER}/whole".encode())
    assert node is not None
    at = filesystem.runs(node)[0].physical * 4096
    follower = kernel.prepare_check(
        one_file(conditions.CONTENT, f"{conditions.UNDER}/whole"), earlier={}, mount=ONLY
    )
    assert follower.check(disk, None).verdict is Verdict.PASS
    disk.pwrite(at, b"?")
    assert follower.check(disk, None).conditions.popitem()[1] is Condition.DAMAGED
    disk.pwrite(at, conditions.CONTENT[:1])
    assert follower.check(disk, None).verdict is Verdict.PASS


def test_what_it_does_not_mount_has_lost_all_files(
    kernel: KernelOracle, shown: conditions.Shown
) -> None:
    disk = opened(shown.image)
    at = Filesystem(disk).inode_offset(ROOT)
    disk.pwrite(at, bytes(128))
    found = kernel.prepare_check(shown.manifest, earlier={}, mount=ONLY).check(disk, None)
    assert found.verdict is Verdict.FAIL and "refuses to mount" in str(found.reason)
    assert set(found.conditions.values()) == {Condition.UNREADABLE}
    assert found.reason is not None and "root inode" in found.reason
    examined = kernel.examine(disk, partition=None)
    assert (examined.mounts, examined.replayed) == (False, ())


def test_no_filesystem_is_unknown(kernel: KernelOracle) -> None:
    found = kernel.prepare_check(one_file(b"x"), earlier={}, mount=ONLY)
    assert found.check(MemoryDisk(SIZE), None).verdict is Verdict.UNKNOWN
    assert kernel.examine(MemoryDisk(SIZE), partition=None).mounts is None


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of another filesystem that holds /a/b, empty, and a link to it from its root."""
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / "image"
    if request.param == "xfs":
        proto = folder / "proto"
        content = folder / "content"
        content.write_bytes(b"content")
        proto.write_text(
            "/stand/diag\n0 0\nd--755 0 0\n"
            f"a d--755 0 0\nb ---644 0 0 {content}\n$\nlink l--777 0 0 /a/b\n$\n"
        )
        format_disk(path, SIZE, fs="xfs", options=["-p", str(proto)])
    else:
        (folder / "root/a").mkdir(parents=True)
        (folder / "root/a/b").write_bytes(b"content")
        (folder / "root/link").symlink_to("/a/b")
        format_disk(path, SIZE, fs="btrfs", options=["--rootdir", str(folder / "root")])
    return path


def test_other_filesystems(kernel: KernelOracle, image: Path) -> None:
    disk = FileDisk(image, read_only=True)
    wanted = Manifest(
        tuple(entry for p in ("/a/b", "/link", "/c") for entry in one_file(b"content", p).entries)
    )
    found = kernel.prepare_check(wanted, earlier={}, mount=ONLY).check(disk, None)
    assert found.conditions == {
        "/a/b": Condition.WHOLE,
        "/link": Condition.WHOLE,
        "/c": Condition.MISSING,
    }
    link = link_entry("/link", "/a/b")
    assert kernel.scan(disk, "/", mount=ONLY).entries == (
        *one_file(b"content", "/a/b").entries,
        link,
    )
    links = Manifest((link, link_entry("/a/b", "x"), link_entry("/a/c", "x")))
    follower = kernel.prepare_check(links, earlier={}, mount=ONLY)
    assert list(follower.check(disk, None).conditions.values()) == [
        Condition.WHOLE,
        Condition.DAMAGED,
        Condition.MISSING,
    ]
    assert locate(kernel, disk, one_file(b"content", "b")) == (
        Tree((Mount(partition=0),)),
        one_file(b"content", "/a/b"),
    )
    examined = kernel.examine(disk, partition=None)
    assert examined.mounts
    assert isinstance(examined.fsck, Fsck) and examined.fsck.clean
    quick = QUICK.prepare_check(wanted, earlier={}, mount=ONLY).check(disk, None)
    assert quick.verdict is Verdict.UNKNOWN and "--oracle kernel" in str(quick.reason)
    with pytest.raises(FilesystemError, match="--oracle kernel"):
        locate(QUICK, disk, wanted)


def test_fat_in_a_partition(kernel: KernelOracle, tmp_path: Path) -> None:
    format_disk(tmp_path / "image", SIZE, fs="vfat", partition_table="gpt")
    disk = FileDisk(tmp_path / "image", read_only=True)
    found = kernel.prepare_check(one_file(b"x"), earlier={}, mount=Mount(partition=1)).check(
        disk, None
    )
    assert found == Findings(Verdict.FAIL, {"/a": Condition.MISSING})


@pytest.fixture
def plain(tmp_path: Path) -> OverlayDisk:
    """An ext4 without checksums that holds /a, /folder/program, and a /sparse of a terabyte."""
    (tmp_path / "root/folder").mkdir(parents=True)
    (tmp_path / "root/folder/program").touch(0o755)
    (tmp_path / "root/folder/link").symlink_to("program")
    (tmp_path / "root/a").write_bytes(b"content")
    (tmp_path / "root/sparse").touch()
    image = tmp_path / "image"
    format_disk(image, SIZE, options=["-O", "^metadata_csum", "-d", str(tmp_path / "root")])
    words = ["debugfs", "-w", "-R", f"sif /sparse size {1 << 40}", str(image)]
    subprocess.run(words, check=True, capture_output=True)
    return opened(image)


def judged(kernel: KernelOracle, disk: OverlayDisk, *entries: Entry) -> Findings:
    return kernel.prepare_check(Manifest(entries), earlier={}, mount=ONLY).check(disk, None)


def test_both_list_the_same(kernel: KernelOracle, plain: OverlayDisk) -> None:
    for modes in (False, True):
        listed, same = (
            oracle.scan(plain, "/folder", mount=ONLY, modes=modes) for oracle in (kernel, QUICK)
        )
        assert listed == same
        assert [entry.mode for entry in listed.entries] == [None, 0o755 if modes else None]
    with pytest.raises(FilesystemError, match="/sparse is sparse and larger than its disk"):
        kernel.scan(plain, "/", mount=ONLY)
    listed, same = (
        oracle.scan(plain, "/", mount=ONLY, without=matcher(["sparse"]))
        for oracle in (kernel, QUICK)
    )
    assert set(listed.entries) == set(same.entries) and len(listed.entries) == 3


@pytest.mark.parametrize("feature", ["filetype", "^filetype"])
@pytest.mark.parametrize("broken", ["a folder's block", "a folder", "a file"])
def test_what_is_broken_hides_nothing_else(
    kernel: KernelOracle, tmp_path: Path, broken: str, feature: str
) -> None:
    """It is unreadable itself, and no more: as the quick oracle has it."""
    folder = tmp_path / "root"
    names = ("app/a", "app/deep/b", "broken/c", "z")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    image = tmp_path / "image"
    format_disk(image, 16 << 20, options=["-O", feature, "-b", "4096", "-d", str(folder)])
    disk = opened(image)
    filesystem = Filesystem(disk)
    path = b"/broken/c" if broken == "a file" else b"/broken"
    node = filesystem.lookup(path)
    assert node is not None
    if broken == "a folder's block":
        disk.pwrite(filesystem.runs(node)[0].physical * 4096, b"\xff" * 4096)
    else:
        disk.pwrite(filesystem.inode_offset(node.number) + 0x64, b"\x5a")  # against its checksum
    wanted = Manifest(tuple(e for n in names for e in one_file(n.encode(), f"/{n}").entries))
    for oracle in (QUICK, kernel):
        with pytest.raises(PartlyListedError, match=path.decode()) as listed:
            oracle.paths(disk, mount=ONLY)
        assert set(listed.value.paths) == {"/app/a", "/app/deep/b", "/z"}
        _, found = locate(oracle, disk, wanted, Where(partition=0))
        assert found == wanted
        tree, found = locate(oracle, disk, wanted)
        assert found == wanted
        judged = oracle.prepare_check(found, earlier={}, mount=tree.mounts[0]).check(disk, None)
        assert judged.conditions == {
            f"/{n}": Condition.UNREADABLE if n == "broken/c" else Condition.WHOLE for n in names
        }
        with pytest.raises(FilesystemError, match=path.decode()):
            oracle.scan(disk, "/", mount=ONLY)


SUPERBLOCK = 1024
INCOMPAT = SUPERBLOCK + 0x60


def test_features_that_the_lab_s_kernel_lacks_are_unknown(
    kernel: KernelOracle, plain: OverlayDisk
) -> None:
    plain.pwrite(INCOMPAT + 3, b"\x40")
    found = judged(kernel, plain, *one_file(b"content").entries)
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert "does not know all of the filesystem" in str(found.reason)


def test_a_journal_on_another_device_is_unknown(kernel: KernelOracle, plain: OverlayDisk) -> None:
    plain.pwrite(SUPERBLOCK + 0xE0, bytes([0, 0, 0, 0, 1, 8, 0, 0]))
    found = judged(kernel, plain, *one_file(b"content").entries)
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert "its journal on another device" in str(found.reason)


@pytest.mark.parametrize(("at", "value"), [(48, bytes(8)), (16, b"\1"), (0x10088, b"\2")])
def test_a_filesystem_on_several_devices_is_unknown(
    kernel: KernelOracle, image: Path, at: int, value: bytes
) -> None:
    """A log, a realtime part (XFS), or a second device (Btrfs)."""
    disk = opened(image)
    disk.pwrite(at, value)
    kind = "btrfs" if at > SUPERBLOCK else "xfs"
    is_its_own = kind_of(disk) == kind
    found = judged(kernel, disk, *one_file(b"content", "/a/b").entries)
    assert (found.verdict is Verdict.UNKNOWN) is is_its_own
    assert ("another device" in str(found.reason)) is is_its_own


def test_what_a_kernel_cannot_read_for_another_reason_is_unknown(
    kernel: KernelOracle, plain: OverlayDisk
) -> None:
    """A file longer than its disk, and folders that may be encrypted."""
    whole, missing = (one_file(b"content", path).entries[0] for path in ("/a", "/b"))
    found = judged(kernel, plain, whole, replace(whole, path="/sparse", size=1 << 40))
    assert found.verdict is Verdict.UNKNOWN and "/sparse: " in str(found.reason)
    assert found.conditions["/a"] is Condition.WHOLE
    assert judged(kernel, plain, whole, missing).verdict is Verdict.FAIL
    plain.pwrite(INCOMPAT + 2, bytes([plain.pread(INCOMPAT + 2, 1)[0] | 1]))
    found = judged(kernel, plain, whole, missing)
    assert found.verdict is Verdict.UNKNOWN and "no key" in str(found.reason)


@pytest.fixture
def ntfs(tmp_path: Path) -> OverlayDisk:
    """An image with /a on it."""
    image, content = tmp_path / "image", tmp_path / "content"
    format_disk(image, SIZE, fs="ntfs")
    content.write_bytes(CLUSTERS)
    subprocess.run(["ntfscp", "-q", image, content, "a"], check=True, capture_output=True)
    return opened(image)


def test_ntfs(kernel: KernelOracle, ntfs: OverlayDisk) -> None:
    """Permissions are the driver's invention there; and nothing is kept of the state before."""
    wanted = Manifest((replace(one_file(CLUSTERS).entries[0], mode=0o600),))
    follower = kernel.prepare_check(wanted, earlier={}, mount=ONLY)
    at = position(ntfs, CLUSTERS)
    for data, condition in ((b"?", Condition.DAMAGED), (CLUSTERS[:1], Condition.WHOLE)):
        ntfs.pwrite(at, data)
        assert follower.check(ntfs, None).conditions == {"/a": condition}
    assert one_file(CLUSTERS).entries[0] in kernel.scan(ntfs, "/", mount=ONLY).entries
    examined = kernel.examine(ntfs, partition=None)
    assert examined.mounts
    assert isinstance(examined.fsck, Fsck) and examined.fsck.clean
    ntfs.pwrite(position(ntfs, b"FILE0") + FIRST_RECORD * 1024, bytes(1024))
    assert follower.check(ntfs, None).verdict is Verdict.FAIL
    examined = kernel.examine(ntfs, partition=None)
    assert isinstance(examined.fsck, Fsck) and not examined.fsck.clean


def test_ntfs_whose_log_would_be_replayed_is_unknown(
    kernel: KernelOracle, ntfs: OverlayDisk
) -> None:
    ntfs.pwrite(position(ntfs, b"\xff" * 4096), b"RSTR")
    found = kernel.prepare_check(one_file(CLUSTERS), earlier={}, mount=ONLY).check(ntfs, None)
    assert (found.verdict, found.conditions) == (Verdict.UNKNOWN, {})
    assert found.reason is not None and "ntfs-3g cannot tell" in found.reason
    assert kernel.examine(ntfs, partition=None).mounts is None


def test_ntfs_that_is_not_mounted_has_lost_all_files(
    kernel: KernelOracle, ntfs: OverlayDisk
) -> None:
    ntfs.pwrite(position(ntfs, b"FILE0"), bytes(5))
    found = kernel.prepare_check(one_file(CLUSTERS), earlier={}, mount=ONLY).check(ntfs, None)
    assert found.verdict is Verdict.FAIL and "refuses to mount" in str(found.reason)
    assert found.reason is not None and found.reason.startswith("ntfs-3g refuses")


def test_a_daemon_that_dies_says_nothing_of_files(kernel: KernelOracle, ntfs: OverlayDisk) -> None:
    part = kernel.place(ntfs, None)
    with pytest.raises(GuestError, match="ENOTCONN"), kernel.mounted(part) as guest:
        number = kernel.number_of(one_file(CLUSTERS), guest)
        guest.ask("fsck", argv=["killall", "-9", "ntfs-3g"])
        place = {"point": "", "root": "", "covered": []}
        guest.ask("judge", manifest=number, place=place, limit=SIZE)


def position(disk: OverlayDisk, wanted: bytes) -> int:
    """Return which cluster begins with some bytes."""
    places = range(0, disk.size, 4096)
    return next(at for at in places if disk.pread(at, len(wanted)) == wanted)


def test_what_the_journal_changes_and_names_of_any_bytes(
    kernel: KernelOracle, tmp_path: Path
) -> None:
    """A journal with one block for a file; the same blocks change by the quick oracle's account."""
    (tmp_path / "root").mkdir()
    name = b"\xff\\\n"
    (tmp_path / "root" / name.decode(errors="surrogateescape")).write_bytes(b"x" * 4096)
    image, block = tmp_path / "image", tmp_path / "block"
    format_disk(image, SIZE, options=["-b", "4096", "-d", str(tmp_path / "root")])
    disk = FileDisk(image, read_only=True)
    node = Filesystem(disk).lookup(b"/" + name)
    assert node is not None
    number = Filesystem(disk).runs(node)[0].physical
    block.write_bytes(b"y" * 4096)
    commands = f"jo -c -v 3\njw -b {number} {block}\njc\n"
    subprocess.run(
        ["debugfs", "-w", "-f", "/dev/stdin", image],
        input=commands.encode(),
        check=True,
        capture_output=True,
    )
    wanted = one_file(b"y" * 4096, "/" + name.decode(errors="surrogateescape"))
    for oracle in (kernel, QUICK):
        assert oracle.prepare_check(wanted, earlier={}, mount=ONLY).check(
            disk, None
        ).conditions == {wanted.entries[0].path: Condition.WHOLE}
        assert oracle.scan(disk, "/", mount=ONLY) == wanted
    quick, real = (o.examine(disk, partition=None) for o in (QUICK, kernel))
    assert [(e.offset, e.length) for e in quick.replayed] == [(number * 4096, 4096)]
    covered = {at for e in real.replayed for at in range(e.offset, e.end, 4096)}
    assert number * 4096 in covered
    assert quick.mounts and real.mounts


def test_a_filesystem_in_the_middle_of_the_tree(kernel: KernelOracle, tmp_path: Path) -> None:
    folder = tmp_path / "root"
    places.fill(folder)
    format_disk(tmp_path / "image", SIZE, fs="ext4", options=["-d", str(folder)])
    disk = FileDisk(tmp_path / "image", read_only=True)
    wanted = places.manifest()
    found = kernel.prepare_check(wanted, earlier={}, mount=places.MOUNT).check(disk, None)
    assert found.conditions == places.expected()
    for under in ("/", "/srv", "/srv/data", "/srv/data/sub"):
        listed = kernel.scan(disk, under, mount=places.MOUNT)
        same = QUICK.scan(disk, under, mount=places.MOUNT)
        assert set(listed.entries) == set(same.entries)
    assert set(kernel.paths(disk, mount=places.MOUNT)) == places.SEEN
    assert kernel.content(disk, listed.entries[0], mount=places.MOUNT) == b"here/sub/b"

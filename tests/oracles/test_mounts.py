"""A filesystem shows somewhere in the guest's tree: its paths and links are followed there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.extents import Extent
from nbdproxy.oracles.check import Verdict, check, paths, scan
from nbdproxy.oracles.incremental_check import IncrementalCheck
from nbdproxy.oracles.mounts import Mount, Tree, above, tree_of
from nbdproxy.oracles.quick import QUICK
from tests.support import places

Make = Callable[..., Path]
Load = Callable[[Path], MemoryDisk]


def test_paths_are_translated_both_ways() -> None:
    mount = Mount("/home", 3, "/@home", ("/home/u/mnt",))
    for guest, own in (("/home", "/@home"), ("/home/u/a", "/@home/u/a")):
        assert mount.inside(guest) == own
        assert mount.outside(own) == guest
    assert mount.outside("/@/etc") is None
    assert mount.outside("/@home2/x") is None
    assert mount.outside("/@home/u/mnt/x") is None
    assert Mount().inside("/a") == "/a" and Mount().outside("/a") == "/a"
    assert Mount("/boot", 1).outside("/") == "/boot"


def test_the_longest_mount_point_above_a_path_has_it() -> None:
    tree = tree_of(
        (Mount("/", 2), Mount("/var", 3), Mount("/var/lib", 4)), {"/tmp": "it is in memory"}
    )
    for path, expected in {
        "/etc/x": 2,
        "/var": 3,
        "/variant": 2,
        "/var/log/x": 3,
        "/var/lib/x": 4,
        "/var/library": 3,
    }.items():
        found = tree.of(path)
        assert isinstance(found, Mount) and found.partition == expected, path
    assert tree.of("/tmp/x") == "it is in memory"
    assert tree.mounts[0].covered == ("/tmp", "/var", "/var/lib")
    assert tree.mounts[1].covered == ("/var/lib",)
    assert isinstance(Tree((Mount("/boot"),)).of("/etc"), str)
    assert tree.shown(3, "/log") == ["/var/log"]
    assert tree.shown(2, "/var/old") == []  # hidden below what is mounted there
    assert list(above("/a/b")) == list(above("//a/b")) == ["/a/b", "/a", "/"]


def test_links_are_followed_in_the_guests_tree(
    make_image: Make, load: Load, tmp_path: Path
) -> None:
    folder = tmp_path / "root"
    places.fill(folder)
    disk = load(make_image("-t", "ext4", "-b", "4096", folder=folder))
    wanted = places.manifest()
    found = check(disk, wanted, mount=places.MOUNT)
    assert found.conditions == places.expected()
    assert found.verdict is Verdict.FAIL
    assert found.reason is not None and "leads to another filesystem" in found.reason
    follower = IncrementalCheck(wanted, mount=places.MOUNT)
    assert follower.check(disk, None) == found
    for at in range(0, disk.size, 1 << 20):  # it is followed as closely as at the top
        disk.pwrite(at + 4095, bytes([disk.pread(at + 4095, 1)[0] ^ 1]))
        changed = [Extent(at + 4095, 1)]
        assert follower.check(disk, changed) == check(disk, wanted, mount=places.MOUNT)
    assert follower.reads.total() < disk.size


def test_what_is_covered_or_beside_is_not_listed(
    make_image: Make, load: Load, tmp_path: Path
) -> None:
    folder = tmp_path / "root"
    places.fill(folder)
    disk = load(make_image("-t", "ext4", folder=folder))
    assert set(paths(disk, mount=places.MOUNT)) == places.SEEN
    for under in ("/", "/srv", "/srv/data"):
        listed = scan(disk, under, mount=places.MOUNT)
        assert {entry.path for entry in listed.entries} == places.SEEN
    below = scan(disk, "/srv/data/sub", mount=places.MOUNT)
    assert [entry.path for entry in below.entries] == ["/srv/data/sub/b"]
    content = QUICK.content(disk, below.entries[0], mount=places.MOUNT)
    assert content == b"here/sub/b"
    nowhere = Mount("/srv", None, "/nowhere")
    assert paths(disk, mount=nowhere) == []
    gone = check(disk, places.manifest(), mount=Mount("/srv/data", None, "/nowhere"))
    assert gone.conditions["/srv/data/a"].value == "missing"

"""The guest's tree is found: by what the user says, by its fstab, or by the files themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where, locate, locate_all, survey_tree
from nbdproxy.oracles.plans import GivenMount
from nbdproxy.oracles.quick import QUICK
from tests.support.systems import (
    BOOT,
    GUEST,
    LUKS,
    ROOT,
    Part,
    ident,
    judged,
    manifest,
    placed,
    root,
)

Make = Callable[..., MemoryDisk]


@pytest.mark.parametrize(
    "name",
    [
        f"UUID={ident(1)}",
        f'UUID="{ident(1).upper()}"',
        "LABEL=boot",
        f"PARTUUID={ident(101)}",
        r"PARTLABEL=part\0401",
        f"/dev/disk/by-uuid/{ident(1)}",
        "/dev/vda1",
    ],
)
def test_an_fstab_names_filesystems_in_many_ways(made: Make, name: str) -> None:
    top = "/dev/vda2" if name == "/dev/vda1" else "LABEL=root"
    lines = (
        f"# a comment\n\n{top} / ext4 defaults 0 1\n{name}\t/boot ext4 ro 0 2\nLABEL=s none swap"
    )
    device = made(BOOT, root(lines))
    tree, found = judged(device, GUEST)
    assert placed(tree) == {"/": 2, "/boot": 1}
    assert (found.verdict, found.reason) == (Verdict.PASS, None)
    assert list(found.conditions) == list(GUEST)


def test_without_an_fstab_the_files_tell(made: Make) -> None:
    tree, found = judged(made(BOOT, root(None)), GUEST)
    assert placed(tree) == {"/": 2, "/boot": 1}
    assert found.verdict is Verdict.PASS


def test_a_file_that_is_gone_is_missed_where_it_belongs(made: Make) -> None:
    wanted = {**GUEST, "/boot/initrd": "gone", "/etc/shadow": "gone"}
    for fstab in (None, "LABEL=root / ext4\nLABEL=boot /boot ext4\n"):
        tree, found = judged(made(BOOT, root(fstab)), wanted)
        assert placed(tree) == {"/": 2, "/boot": 1}
        lost = {p for p, c in found.conditions.items() if c is not Condition.WHOLE}
        assert lost == {"/boot/initrd", "/etc/shadow"}
        assert found.verdict is Verdict.FAIL


def test_what_a_mount_hides_is_not_taken_for_what_is_mounted(made: Make) -> None:
    """The root has an older /boot/vmlinuz below the mount point."""
    below = {"/boot/vmlinuz": "kernel"}
    empty = Part({"/vmlinuz": "former"}, "boot")
    lines = "LABEL=root / ext4\nLABEL=boot /boot ext4\n"
    tree, found = judged(made(empty, root(lines, below)), {**ROOT, **below})
    assert placed(tree) == {"/": 2, "/boot": 1}
    assert found.conditions["/boot/vmlinuz"] is Condition.DAMAGED
    _, found = judged(made(empty, root(None, below)), {**ROOT, **below})
    assert found.conditions["/boot/vmlinuz"] is Condition.CANNOT_BE_TOLD
    assert found.verdict is Verdict.UNKNOWN
    assert found.reason is not None and "also on partition 1" in found.reason


NESTED = "LABEL=root / ext4\nLABEL=boot /boot ext4\nLABEL=var /var ext4\nLABEL=lib /var/lib ext4\n"


def test_mount_points_are_nested(made: Make) -> None:
    var = Part({"/log/syslog": "log", "/lib/hidden": "x"}, "var")
    lib = Part({"/dpkg/status": "packages"}, "lib")
    wanted = {**GUEST, "/var/log/syslog": "log", "/var/lib/dpkg/status": "packages"}
    for fstab in (NESTED, None):
        tree, found = judged(made(BOOT, root(fstab), var, lib), wanted)
        assert placed(tree) == {"/": 2, "/boot": 1, "/var": 3, "/var/lib": 4}
        assert found.verdict is Verdict.PASS
    _, found = judged(made(BOOT, root(NESTED), var, lib), {**wanted, "/var/lib/hidden": "x"})
    assert found.conditions["/var/lib/hidden"] is Condition.MISSING


def test_what_lies_in_luks_cannot_be_told(made: Make) -> None:
    luks = Part(raw=LUKS)
    wanted = {**GUEST, "/home/u/letter": "dear", "/etc/shadow": "gone"}
    _, found = judged(made(BOOT, root(None), luks), wanted)
    assert found.conditions["/home/u/letter"] is Condition.CANNOT_BE_TOLD
    assert found.conditions["/etc/shadow"] is Condition.MISSING  # beside files that are there
    assert found.reason is not None and "partition 3 is LUKS1" in found.reason
    for line in ("/dev/mapper/home /home ext4", "UUID=12 /home ext4"):
        fstab = f"LABEL=root / ext4\nLABEL=boot /boot ext4\n{line}\n"
        tree, found = judged(made(BOOT, root(fstab), luks), wanted)
        assert found.conditions["/home/u/letter"] is Condition.CANNOT_BE_TOLD
        assert "partition 3 is LUKS1" in tree.unreadable["/home"]
    crypttab = {"/etc/crypttab": "home PARTUUID=" + ident(103) + " none luks\n"}
    fstab = "LABEL=root / ext4\nLABEL=boot /boot ext4\n/dev/mapper/home /home ext4\n"
    named = made(BOOT, root(fstab, crypttab), luks)
    tree, found = judged(named, {**wanted, "/srv/new": "gone"})
    assert "not read here: partition 3 is LUKS1" in tree.unreadable["/home"]
    assert found.conditions["/srv/new"] is Condition.MISSING  # nothing else can hide it
    only = made(BOOT, root(fstab), luks)
    _, found = judged(only, {**wanted, "/srv/new": "gone"})
    assert found.conditions["/srv/new"] is Condition.CANNOT_BE_TOLD


def test_a_copy_of_a_root_that_cannot_be_read_is_not_the_root(made: Make) -> None:
    fstab = "/dev/mapper/root / ext4\nLABEL=boot /boot ext4\n"
    crypttab = {"/etc/crypttab": "root PARTUUID=" + ident(103) + " none luks\n"}
    tree, found = judged(made(BOOT, root(fstab, crypttab), Part(raw=LUKS)), GUEST)
    assert "not read here: partition 3 is LUKS1" in tree.unreadable["/"]
    assert found.conditions["/etc/passwd"] is Condition.CANNOT_BE_TOLD
    assert found.conditions["/boot/vmlinuz"] is Condition.WHOLE


def test_what_an_fstab_puts_on_another_disk_cannot_be_told(made: Make) -> None:
    fstab = (
        "LABEL=root / ext4\nLABEL=boot /boot ext4\nUUID=77 /home xfs\n"
        "tmpfs /tmp tmpfs\nserver:/x /net nfs4\n"
    )
    wanted = {
        **GUEST,
        "/home/u/a": "a",
        "/tmp/b": "b",
        "/net/c": "c",
        "/run/d": "d",
        "/homely": "x",
    }
    tree, found = judged(made(BOOT, root(fstab)), wanted)
    told = {p for p, c in found.conditions.items() if c is Condition.CANNOT_BE_TOLD}
    assert told == {"/home/u/a", "/tmp/b", "/net/c", "/run/d"}
    assert found.conditions["/homely"] is Condition.MISSING
    assert "UUID=77, which is not on this disk" in tree.unreadable["/home"]
    assert "tmpfs" in tree.unreadable["/tmp"] and "network" in tree.unreadable["/net"]


def test_a_single_filesystem_is_told_by_its_fstab_too(made: Make) -> None:
    fstab = "LABEL=root / ext4\nUUID=77 /home xfs\n"
    _, found = judged(made(root(fstab)), {**ROOT, "/home/u/a": "a", "/srv/b": "b"})
    assert found.conditions["/home/u/a"] is Condition.CANNOT_BE_TOLD
    assert found.conditions["/srv/b"] is Condition.MISSING


def test_the_user_says_what_is_mounted_where(made: Make) -> None:
    device = made(BOOT, root(None), Part({"/u/letter": "dear"}, "home"))
    wanted = {**GUEST, "/home/u/letter": "dear", "/boot/new": "n", "/srv/x": "x"}
    mounts = (GivenMount("1", "/boot"), GivenMount("LABEL=root", "/"), GivenMount("3", "/home"))
    tree, found = judged(device, wanted, Where(mounts=mounts))
    assert placed(tree) == {"/": 2, "/boot": 1, "/home": 3}
    assert found.conditions["/boot/new"] is Condition.MISSING
    deeper = Where(mounts=(GivenMount("2", "/"), GivenMount("3", "/home/me", "/u")))
    _, found = judged(device, {**ROOT, "/home/me/letter": "dear"}, deeper)
    assert found.verdict is Verdict.PASS
    some = Where(mounts=(GivenMount("3", "/home"),))  # the rest is looked for
    assert placed(judged(device, wanted, some)[0]) == {"/": 2, "/boot": 1, "/home": 3}
    fstab = made(BOOT, root("LABEL=root / ext4\nLABEL=boot /efi ext4\n"))
    over = Where(mounts=(GivenMount("1", "/boot"),))
    assert placed(judged(fstab, GUEST, over)[0])["/boot"] == 1
    for wrong in (GivenMount("7", "/"), GivenMount("LABEL=nothing", "/")):
        with pytest.raises(FilesystemError, match="no filesystem is called so; there are: part"):
            judged(device, wanted, Where(mounts=(wrong,)))


def test_a_bind_mount_shows_a_directory_twice(made: Make) -> None:
    data = Part({"/www/index": "page", "/sub/x": "x"}, "data")
    fstab = (
        "LABEL=root / ext4\nLABEL=data /srv ext4\n/srv/www /var/www none bind\n"
        "LABEL=boot /srv/boot ext4\n/srv /mnt none rbind\n"
    )
    wanted = {
        **ROOT,
        "/srv/www/index": "page",
        "/var/www/index": "page",
        "/mnt/boot/vmlinuz": "kernel",
    }
    tree, found = judged(made(BOOT, root(fstab, None, "/srv"), data), wanted)
    assert found.verdict is Verdict.PASS
    assert placed(tree)["/var/www"] == 3 and placed(tree)["/mnt/boot"] == 1


def test_what_is_bound_is_mounted_before_what_binds_it(made: Make) -> None:
    data = Part({"/store/app/x": "x"}, "data")
    fstab = (
        "LABEL=root / ext4\n/data/app /srv/app none bind\n/mnt/store /data none bind\n"
        "LABEL=data /mnt ext4\n"
    )
    device = made(root(fstab, None, "/data/app", "/srv/app", "/mnt"), data)
    wanted = {**ROOT, "/mnt/store/app/x": "x", "/data/app/x": "x", "/srv/app/x": "x"}
    assert judged(device, wanted)[1].verdict is Verdict.PASS


def test_what_is_mounted_at_a_link_is_where_the_link_leads(made: Make) -> None:
    links = {"/app": "srv/app", "/way": "/app/../app", "/loop": "loop"}
    fstab = (
        "LABEL=root / ext4\nLABEL=data /way/ ext4\nLABEL=boot /app/boot ext4\n"
        "/way/www /www none bind\nLABEL=gone /loop ext4\n"
    )
    top = Part({**ROOT, "/etc/fstab": fstab}, "root", folders=("/srv/app", "/www"), links=links)
    device = made(BOOT, top, Part({"/www/index": "page", "/boot/none": ""}, "data"))
    wanted = {
        **ROOT,
        "/srv/app/www/index": "page",
        "/way/www/index": "page",
        "/www/index": "page",
        "/srv/app/boot/vmlinuz": "kernel",
    }
    assert judged(device, wanted)[1].verdict is Verdict.PASS
    told = Where(mounts=(GivenMount("2", "/"), GivenMount("3", "/app")))
    assert judged(device, {**ROOT, "/srv/app/www/index": "page"}, told)[1].verdict is Verdict.PASS
    assert judged(device, {**wanted, "/loop/x": ""})[1].conditions["/loop/x"] is (
        Condition.CANNOT_BE_TOLD
    )


@pytest.mark.parametrize("others", [(), (BOOT,)], ids=["alone", "beside another"])
def test_a_copy_is_not_taken_for_files_that_are_all_gone(
    made: Make, others: tuple[Part, ...]
) -> None:
    copies = {f"/backup/app/{n}.js": f"content {n}" for n in range(6)}
    device = made(*others, root("LABEL=root / ext4\n", copies, "/app"))
    with pytest.raises(ManifestError, match="--root"):
        judged(device, {f"/app/{n}.js": f"content {n}" for n in range(6)})
    _, found = judged(device, {f"/app/{n}.js": f"content {n}" for n in range(6)}, Where(root="/"))
    assert set(found.conditions.values()) == {Condition.MISSING}


def test_what_is_mounted_on_demand_is_told_by_the_files(made: Make) -> None:
    fstab = "LABEL=root / ext4\nLABEL=boot /boot ext4 noauto\n"
    device = made(BOOT, root(fstab))
    assert judged(device, GUEST)[1].verdict is Verdict.PASS
    _, found = judged(device, {**ROOT, "/boot/new": "new"})
    assert found.conditions["/boot/new"] is Condition.CANNOT_BE_TOLD
    assert found.reason is not None and "--mount" in found.reason


def test_of_several_systems_the_one_with_the_files_counts(made: Make) -> None:
    other = Part({"/etc/fstab": "LABEL=other / ext4\n", "/etc/passwd": "others"}, "other")
    device = made(BOOT, root("LABEL=root / ext4\nLABEL=boot /boot ext4\n"), other)
    assert placed(judged(device, GUEST)[0]) == {"/": 2, "/boot": 1}
    with pytest.raises(FilesystemError, match="--mount"):
        judged(device, {"/etc/passwd": "users"})
    assert placed(
        judged(device, {"/etc/passwd": "users"}, Where(mounts=(GivenMount("3", "/"),)))[0]
    ) == {"/": 3}


NEW = {f"/app/{number}": f"new {number}" for number in range(6)}
LOST = {path: text for path, text in NEW.items() if path != "/app/5"}
OLD = dict.fromkeys(NEW, "old")


@pytest.mark.parametrize("names", [("root", "other"), ("root", "root"), None])
def test_older_files_of_the_same_names_are_not_taken_for_those_that_are_left(
    made: Make, names: tuple[str, str] | None
) -> None:
    parts = []
    for name, files in zip(names or ("root", "other"), (OLD, LOST), strict=True):
        fstab = {"/etc/fstab": f"LABEL={name} / ext4\n"} if names else {}
        parts.append(Part({"/etc/hosts": "hosts", **fstab, **files}, name))
    wanted = {"/etc/hosts": "hosts", **NEW}
    tree, found = judged(made(*parts), wanted)
    assert placed(tree) == {"/": 2}
    assert {path for path, what in found.conditions.items() if what is not Condition.WHOLE} == {
        "/app/5"
    }
    copy = Part({**parts[0].files, **NEW}, parts[0].label)
    with pytest.raises(FilesystemError, match="equally well"):
        judged(made(copy, parts[1]), wanted)  # a copy may have what the original lost


@pytest.mark.parametrize("fstab", ["LABEL=root / ext4\n", None])
def test_a_copy_in_another_directory_is_not_what_was_asked_for(
    made: Make, fstab: str | None
) -> None:
    copy = {f"/backup{path}": text for path, text in NEW.items()}
    for parts in ([], [BOOT]):
        _, found = judged(made(*parts, root(fstab, {**LOST, **copy})), {**ROOT, **NEW})
        assert found.conditions["/app/5"] is Condition.MISSING
        _, found = judged(made(*parts, root(fstab, {**LOST, **copy})), NEW)
        assert found.conditions["/app/5"] is Condition.MISSING


def test_relative_paths_are_told_by_content_where_names_are_at_several_places(made: Make) -> None:
    older = {f"/older/{path[5:]}": text for path, text in OLD.items()}
    copy = {f"/copy/{path[5:]}": text for path, text in NEW.items()}
    wanted = manifest({path[5:]: text for path, text in NEW.items()})
    _, found = locate(QUICK, made(root(None, {**LOST, **older})), wanted)
    assert found.entries[0].path == "/app/0"
    with pytest.raises(ManifestError, match="equally well under /app, /copy"):
        locate(QUICK, made(root(None, {**LOST, **copy})), wanted)


def test_relative_paths_are_found_in_the_whole_tree(made: Make) -> None:
    device = made(BOOT, root("LABEL=root / ext4\nLABEL=boot /boot ext4\n"))
    _, found = locate(QUICK, device, manifest({"grub/grub.cfg": "menu", "vmlinuz": "kernel"}))
    assert [entry.path for entry in found.entries] == ["/boot/grub/grub.cfg", "/boot/vmlinuz"]


def test_a_manifest_of_nothing_is_refused(made: Make) -> None:
    nothing = manifest({"/nowhere": "x"})
    for device in (made(BOOT, root(None)), made(BOOT, root("LABEL=root / ext4\n"))):
        with pytest.raises(ManifestError, match="--root"):
            locate(QUICK, device, nothing)
    with pytest.raises(FilesystemError, match="partition 3 is LUKS1"):
        locate(QUICK, made(BOOT, root(None), Part(raw=LUKS)), nothing)
    with pytest.raises(FilesystemError, match="partition 1 is LUKS1"):
        locate(QUICK, made(Part(raw=LUKS)), nothing)
    fstab = made(BOOT, root("LABEL=root / ext4\nLABEL=boot /boot ext4\n"))
    tree, _ = locate(QUICK, fstab, nothing, Where(root="/"))
    assert placed(tree) == {"/": 2, "/boot": 1}


def test_a_link_into_another_filesystem_cannot_be_told(made: Make) -> None:
    fstab = "LABEL=root / ext4\nLABEL=boot /boot ext4\n"
    linked = Part(
        {**ROOT, "/etc/fstab": fstab}, "root", folders=("/boot",), links={"/kernels": "/boot"}
    )
    _, found = judged(made(BOOT, linked), {**GUEST, "/kernels/vmlinuz": "kernel"})
    assert found.conditions.pop("/kernels/vmlinuz") is Condition.CANNOT_BE_TOLD
    assert set(found.conditions.values()) == {Condition.WHOLE}
    assert found.verdict is Verdict.UNKNOWN


def test_a_filesystem_that_breaks_loses_its_own_files_only(made: Make) -> None:
    device = made(BOOT, root("LABEL=root / ext4\nLABEL=boot /boot ext4\n"))
    tree, found = locate(QUICK, device, manifest(GUEST))
    follower = TreeCheck(QUICK, found, {}, tree)
    assert follower.check(device, None).verdict is Verdict.PASS
    device.pwrite((1 << 20) + 1080, b"??")
    now = follower.check(device, None)
    assert now.verdict is Verdict.UNKNOWN
    boot = {path for path, c in now.conditions.items() if c is Condition.CANNOT_BE_TOLD}
    assert boot == {"/boot/vmlinuz", "/boot/grub/grub.cfg"}
    device.pwrite(1 << 20, bytes(8 << 20))
    now = follower.check(device, None)
    assert now.verdict is Verdict.FAIL and now.conditions["/boot/vmlinuz"] is Condition.MISSING
    assert now.reason is not None and "partition 1 reads all zeroes" in now.reason
    assert now.conditions["/etc/passwd"] is Condition.WHOLE


def test_the_disks_of_one_guest_are_looked_at_together(made: Make) -> None:
    fstab = f"LABEL=root / ext4\nLABEL=boot /boot ext4\nUUID={ident(1)} /home ext4\n"
    first, second = made(BOOT, root(fstab)), made(Part({"/u/a": "a"}, "home"))
    wanted = manifest({**GUEST, "/home/u/a": "a", "/home/u/new": "n"})
    (one, two), _ = locate_all(QUICK, [first, second], wanted)
    assert placed(one) == {"/": 2, "/boot": 1} and not two.mounts
    assert "several filesystems are called so" in two.unreadable["/home"]
    fstab = "LABEL=root / ext4\nLABEL=boot /boot ext4\nLABEL=home /home ext4\n"
    (one, two), found = locate_all(QUICK, [made(BOOT, root(fstab)), second], wanted)
    assert (placed(one), placed(two)) == ({"/": 2, "/boot": 1}, {"/home": 1})
    assert found == wanted
    assert isinstance(one.of("/home/u/a"), str) and isinstance(two.of("/etc/passwd"), str)
    (two, one), _ = locate_all(QUICK, [second, made(BOOT, root(fstab))], wanted)
    assert (placed(one), placed(two)) == ({"/": 2, "/boot": 1}, {"/home": 1})
    (one, two), _ = locate_all(QUICK, [made(BOOT, root(None)), second], wanted)
    assert (placed(one), placed(two)) == ({"/": 2, "/boot": 1}, {"/home": 1})


def test_what_an_asked_partition_leaves_out_cannot_be_told(made: Make) -> None:
    """Its fstab says that /boot is on another one: nothing there is lost."""
    lines = "LABEL=root / ext4\nLABEL=boot /boot ext4\nUUID=1-2 /data ext4\ntmpfs /tmp tmpfs\n"
    wanted = {**GUEST, "/data/db": "rows", "/tmp/x": "x", "/etc/shadow": "gone"}
    device = made(BOOT, root(lines))
    for where in (Where(partition=2), Where(partition=2, root="/")):
        tree, found = judged(device, wanted, where)
        told = {p for p, c in found.conditions.items() if c is Condition.CANNOT_BE_TOLD}
        assert told == {"/boot/vmlinuz", "/boot/grub/grub.cfg", "/data/db", "/tmp/x"}
        assert found.conditions["/etc/shadow"] is Condition.MISSING
        why = "/boot is on partition 1 (by fstab), which --partition 2 leaves out"
        assert tree.doubtful["/boot/vmlinuz"] == why
    _, found = judged(made(BOOT, root(None)), wanted, Where(partition=2))
    assert found.conditions["/boot/vmlinuz"] is Condition.MISSING, "without a known tree"


def test_what_an_asked_partition_has_below_a_mount_is_seen_there(made: Make) -> None:
    """Such a manifest is made with `manifest --partition`."""
    lines = "LABEL=root / ext4\nLABEL=boot /boot ext4\n"
    below = {"/boot/vmlinuz": "kernel"}
    _, found = judged(made(BOOT, root(lines, below)), {**ROOT, **below}, Where(partition=2))
    assert found.verdict is Verdict.PASS


def test_what_is_mounted_may_be_named_though_it_cannot_be_read(made: Make) -> None:
    """Files below it cannot be told, and nothing else is in doubt."""
    device = made(root(None), Part(raw=LUKS))
    wanted = {**ROOT, "/data/db": "rows", "/opt/gone": "gone"}
    for what in ("2", f"PARTUUID={ident(102)}"):
        for more in ((), (GivenMount("1", "/"),)):
            where = Where(mounts=(GivenMount(what, "/data"), *more))
            tree, found = judged(device, wanted, where)
            assert found.conditions["/data/db"] is Condition.CANNOT_BE_TOLD
            assert found.conditions["/opt/gone"] is Condition.MISSING
            assert tree.unreadable == {"/data": "/data is not read here: partition 2 is LUKS1"}
    with pytest.raises(FilesystemError, match=r"/ is not read here: partition 2 is LUKS1"):
        judged(device, wanted, Where(mounts=(GivenMount("2", "/"),)))


def test_a_broken_folder_hides_nothing_else(made: Make) -> None:
    """The fstab beside it is read, and only the files within are not."""
    device = made(BOOT, root("LABEL=root / ext4\nLABEL=boot /boot ext4\n"))
    at = device.pread(0, device.size).index(b"\x04\x01true") & -4096
    device.pwrite(at, b"\xff" * 4096)
    tree, found = judged(device, GUEST, Where(root="/"))
    assert placed(tree) == {"/": 2, "/boot": 1}
    broken = {p for p, c in found.conditions.items() if c is not Condition.WHOLE}
    assert broken == {"/usr/bin/true"}
    assert found.conditions["/usr/bin/true"] is Condition.UNREADABLE


def test_a_disk_of_several_is_named_with_what_is_on_it(made: Make) -> None:
    home, data = Part({"/u/a": "a"}, "home"), Part({"/d": "d"}, "data")
    devices = [made(BOOT, root(None)), made(home, data), made(home), made(Part(raw=LUKS))]
    names = ["runs/system", "runs/users.img", "old/home", "runs/vault"]
    wanted = manifest({**GUEST, "/home/u/a": "a", "/srv/d": "d", "/old/u/a": "a", "/v/x": "x"})
    for users, old in (("users.img", "home"), ("runs/users.img", "old/home")):
        told = (
            GivenMount("system/2", "/"),
            GivenMount("system/LABEL=boot", "/boot"),
            GivenMount(f"{users}/1", "/home"),
            GivenMount(f"{users}/LABEL=data", "/srv"),
            GivenMount(old, "/old"),
            GivenMount("vault", "/v"),
        )
        trees, _ = locate_all(QUICK, devices, wanted, Where(mounts=told), names=names)
        assert [placed(tree) for tree in trees] == [
            {"/": 2, "/boot": 1},
            {"/home": 1, "/srv": 2},
            {"/old": 1},
            {},
        ]
        assert trees[3].unreadable["/v"] == "/v is not read here: partition 1 of vault is LUKS1"
    for what, why in (
        ("users.img", "several filesystems are called so"),
        ("1", "several filesystems are called so"),
        ("users.img/3", "no filesystem is called so"),
        ("other/1", "no filesystem is called so"),
    ):
        with pytest.raises(FilesystemError, match=why) as error:
            where = Where(mounts=(GivenMount(what, "/home"),))
            locate_all(QUICK, devices, wanted, where, names=names)
        assert "partition 2 of users.img" in str(error.value)
        assert "the disks are system, users.img, home, vault" in str(error.value)
    same = ["a/disk", "b/disk", "c/disk", "d/disk"]
    where = Where(mounts=(GivenMount("a/disk/2", "/"), GivenMount("c/disk", "/home")))
    trees, _ = locate_all(QUICK, devices, wanted, where, names=same)
    assert placed(trees[2]) == {"/home": 1}
    with pytest.raises(FilesystemError, match="the disks are a/disk, b/disk"):
        locate_all(QUICK, devices, wanted, Where(mounts=(GivenMount("disk/1", "/"),)), names=same)


def test_the_fstab_of_a_root_that_is_told_is_read(made: Make) -> None:
    """What is told counts more, and an fstab of another system does not."""
    lines = "LABEL=root / ext4\nLABEL=boot /boot ext4\nUUID=77 /data ext4\n"
    other = Part({**ROOT, "/etc/fstab": "LABEL=boot /efi ext4\n"}, "other")
    device = made(BOOT, root(lines), other, Part({"/k": "k"}, "more"))
    tree, found = judged(
        device, {**GUEST, "/data/x": "x", "/new": "n"}, Where(mounts=(GivenMount("2", "/"),))
    )
    assert placed(tree) == {"/": 2, "/boot": 1}
    assert found.conditions["/data/x"] is Condition.CANNOT_BE_TOLD
    assert found.conditions["/new"] is Condition.MISSING
    assert "UUID=77, which is not on this disk" in tree.unreadable["/data"]
    assert placed(survey_tree(QUICK, device, Where(mounts=(GivenMount("2", "/"),)))) == placed(tree)
    over = Where(mounts=(GivenMount("2", "/"), GivenMount("4", "/boot")))
    assert placed(judged(device, {**ROOT, "/boot/k": "k"}, over)[0]) == {"/": 2, "/boot": 4}
    assert placed(judged(device, ROOT, Where(mounts=(GivenMount("3", "/"),)))[0]) == {
        "/": 3,
        "/efi": 1,
    }


def test_a_data_disk_alone_has_some_of_a_whole_guests_files(made: Make) -> None:
    device = made(Part({"/u/a.js": "text", "/u/b.js": "old"}, "home"))
    wanted = {**ROOT, "/home/u/a.js": "text", "/home/u/b.js": "new", "/home/u/c.js": "gone"}
    tree, found = judged(device, wanted)
    assert placed(tree) == {"/home": 1}
    ours = {path: c for path, c in found.conditions.items() if path.startswith("/home")}
    assert list(ours.values()) == [Condition.WHOLE, Condition.DAMAGED, Condition.MISSING]
    others = {found.conditions[path] for path in ROOT}
    assert others == {Condition.CANNOT_BE_TOLD}, "they are on a disk that was not recorded"

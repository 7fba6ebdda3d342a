"""A copy of a system, or of some files, is not taken for the original that cannot be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where, locate
from nbdproxy.oracles.mounts import Mount
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
        "/dev/mapper/root / ext4",
        f"UUID={ident(77)} / ext4",
        "LABEL=former / ext4",
        "/dev/sda3 / ext4",
        "pool/root / zfs",
    ],
)
def test_a_copy_of_a_root_that_is_hidden_is_not_the_root(made: Make, name: str) -> None:
    """No crypttab says that the root is in LUKS, but it may be, and this one is not it."""
    device = made(BOOT, root(f"{name}\nLABEL=boot /boot ext4\n"), Part(raw=LUKS))
    relative = {path.removeprefix("/"): text for path, text in ROOT.items()}
    for wanted in (ROOT, relative):
        with pytest.raises(FilesystemError, match=r"nothing can be judged: / is .*LUKS1"):
            judged(device, wanted)
    _, found = judged(device, GUEST)
    assert found.conditions["/etc/passwd"] is Condition.CANNOT_BE_TOLD
    assert found.conditions["/boot/vmlinuz"] is Condition.WHOLE
    told = Where(mounts=(GivenMount("2", "/"), GivenMount("1", "/boot")))
    assert judged(device, GUEST, told)[1].verdict is Verdict.PASS


def test_a_root_with_a_former_name_is_the_root_if_all_else_is_accounted_for(made: Make) -> None:
    lines = f"UUID={ident(77)} / ext4\n/dev/mapper/home /home ext4\n"
    crypttab = {"/etc/crypttab": f"home PARTUUID={ident(103)} none luks\n"}
    tree, found = judged(made(BOOT, root(lines, crypttab), Part(raw=LUKS)), ROOT)
    assert placed(tree) == {"/": 2} and found.verdict is Verdict.PASS
    assert judged(made(root(lines)), ROOT)[1].verdict is Verdict.PASS
    for name in ("/dev/root", "rootfs", "none"):
        _, found = judged(made(root(f"{name} / auto\n")), ROOT)
        assert found.verdict is Verdict.PASS, name


@pytest.mark.parametrize("line", ["tmpfs / tmpfs", "overlay / overlay", "server:/r / nfs4"])
def test_what_is_no_disk_is_not_judged_by_a_disk(made: Make, line: str) -> None:
    device = made(root(f"{line}\nLABEL=root /media ext4\n", None, "/media"))
    with pytest.raises(FilesystemError, match="nothing can be judged: / is"):
        judged(device, {**ROOT, "/new": "n"})
    _, found = judged(device, {"/media/etc/passwd": "users", "/new": "n"})
    assert found.conditions["/media/etc/passwd"] is Condition.WHOLE
    assert found.conditions["/new"] is Condition.CANNOT_BE_TOLD


def test_what_hides_files_in_another_state_hides_them_here(made: Make) -> None:
    """The header of LUKS was not there yet at the cut, or was wiped by the end."""
    lines = "LABEL=root / ext4\n"
    empty, hidden = (made(root(lines), BOOT, Part(raw=raw)) for raw in (bytes(512), LUKS))
    wanted = {**ROOT, "/vault/key": "secret"}
    assert judged(empty, wanted)[1].conditions["/vault/key"] is Condition.MISSING
    for one, other in ((empty, hidden), (hidden, empty)):
        tree, _ = locate(QUICK, one, manifest(wanted), Where(), other)
        assert "partition 3 is LUKS1" in str(tree.of("/vault/key"))
        assert isinstance(tree.of("/etc/passwd"), Mount)
    gone = made(root(lines), Part(raw=bytes(512)), Part(raw=bytes(512)))
    tree, _ = locate(QUICK, gone, manifest(GUEST), Where(), empty)
    assert "partition 2 has a filesystem at another time" in str(tree.of("/boot/vmlinuz"))
    formatted = made(root(lines), Part(raw=LUKS), Part(raw=bytes(512)))
    tree, _ = locate(QUICK, empty, manifest(wanted), Where(), formatted)
    assert isinstance(tree.of("/vault/key"), Mount), "what was read here may be formatted later"


def test_a_whole_copy_is_not_taken_for_files_most_of_which_were_lost(made: Make) -> None:
    """What looks lost, and not older, may have been whole where it belongs."""
    files = {f"/app/{number}": f"new {number} " * 2000 for number in range(10)}
    left = {path: text for path, text in files.items() if path[-1] in "012"}
    zeroed = {**dict.fromkeys(files, ""), "/app/0": files["/app/0"]}
    zeroed |= {path: "\0" * len(files[path]) for path in ("/app/7", "/app/8")}
    for lost in (left, zeroed):
        parts = (Part({**ROOT, **lost}, "root"), Part({**ROOT, **files}, "copy"))
        for one in (parts, parts[::-1]):
            with pytest.raises(FilesystemError, match="equally well"):
                judged(made(*one), files)
        tops = [root(f"LABEL={name} / ext4\n", more) for name, more in (("a", lost), ("b", files))]
        pair = [replace(part, label=name) for part, name in zip(tops, "ab", strict=True)]
        with pytest.raises(FilesystemError, match="--mount"):
            judged(made(*pair), {"/etc/hosts": "hosts", **files})
        both = Part({**lost, **{f"/copy{path[4:]}": text for path, text in files.items()}})
        wanted = {path[5:]: text for path, text in files.items()}
        with pytest.raises(ManifestError, match="equally well under /app, /copy"):
            judged(made(both), wanted)


def test_an_older_system_beside_it_is_no_rival(made: Make) -> None:
    """It has some of the files, and others of the same names; nothing of it looks lost."""
    files = {f"/app/{number}": f"new {number} " * 2000 for number in range(10)}
    older = {path: text.replace("new", "old") for path, text in files.items() if path[-1] in "0123"}
    device = made(Part({**ROOT, **files}, "now"), Part({**ROOT, **older}, "before"))
    tree, found = judged(device, {"/etc/hosts": "hosts", **files})
    assert placed(tree) == {"/": 1} and found.verdict is Verdict.PASS


def test_an_older_root_without_fstab_is_not_judged_for_one_that_may_be_hidden(made: Make) -> None:
    older = Part(dict.fromkeys(ROOT, "older content"), "root")
    for parts in ((older,), (older, BOOT)):
        assert Condition.WHOLE not in judged(made(older), ROOT)[1].conditions.values()
        with pytest.raises(FilesystemError, match="LUKS1"):
            judged(made(*parts, Part(raw=LUKS)), ROOT)


def test_a_filesystem_that_no_fstab_mounts_has_no_files_of_the_guest(made: Make) -> None:
    """All were lost on the root; the other has a copy, by absolute and by relative paths."""
    files = {f"/app/{number}": f"new {number}" for number in range(6)}
    device = made(root("LABEL=root / ext4\n"), Part(files, "backup"))
    for wanted in (files, {path[1:]: text for path, text in files.items()}):
        with pytest.raises(ManifestError, match="--mount"):
            judged(device, wanted)

"""A copy of a system, or of some files, is not taken for the original that cannot be seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where
from nbdproxy.oracles.plans import Told
from tests.support.systems import BOOT, GUEST, LUKS, ROOT, Part, ident, judged, placed, root

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
    told = Where(mounts=(Told("2", "/"), Told("1", "/boot")))
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

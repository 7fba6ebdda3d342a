"""Files in another directory than a manifest says: a data disk's mount point, or only a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError, ManifestError
from nbdproxy.oracles.check import Verdict
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where
from nbdproxy.oracles.moves import may_show_at
from nbdproxy.oracles.plans import GivenMount
from tests.support.systems import BOOT, GUEST, ROOT, Part, judged, placed, root

Make = Callable[..., MemoryDisk]
APP = {f"/app/{n}.js": f"content {n}" for n in range(6)}


def moved(front: str, files: dict[str, str] = APP) -> dict[str, str]:
    """The files in another directory."""
    return {front + path: text for path, text in files.items()}


@pytest.mark.parametrize("others", [(), (BOOT,)], ids=["alone", "beside another"])
@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (moved("/backup"), APP),
        (APP, moved("/backup")),
        (APP, moved("/srv/a/b")),
        (moved("/backup"), moved("/srv")),
    ],
    ids=["below", "above", "far above", "beside"],
)
def test_a_copy_on_a_root_without_fstab_is_not_taken_for_lost_files(
    made: Make, others: tuple[Part, ...], there: dict[str, str], wanted: dict[str, str]
) -> None:
    device = made(*others, root(None, there))
    with pytest.raises((ManifestError, FilesystemError), match="--root"):
        judged(device, wanted)
    part = Where(partition=len(others) + 1)
    with pytest.raises(ManifestError, match="--mount"):
        judged(device, wanted, part)
    if not others:
        _, found = judged(device, wanted, Where(root="/"))
        assert set(found.conditions.values()) == {Condition.MISSING}


@pytest.mark.parametrize("fstab", ["LABEL=root / ext4\n", None])
def test_a_root_seen_from_outside_has_to_be_named(made: Make, fstab: str | None) -> None:
    device = made(BOOT, root(fstab))
    seen = moved("/mnt/guest", GUEST)
    with pytest.raises(ManifestError, match="--mount"):
        judged(device, seen)
    mounts = Where(mounts=(GivenMount("2", "/mnt/guest"), GivenMount("1", "/mnt/guest/boot")))
    assert judged(device, seen, mounts)[1].verdict is Verdict.PASS


def test_a_data_disk_is_where_its_guest_mounts_it(made: Make) -> None:
    data = Part({"/u/a": "a", "/u/b": "b", "/v/c": "c"}, "home")
    wanted = {"/home/u/a": "a", "/home/u/b": "b", "/home/u/new": "n", "/home/v/c": "c"}
    for parts in ((data,), (data, Part({"/other": "x"}))):
        _, found = judged(made(*parts), wanted)
        lost = [path for path, one in found.conditions.items() if one is not Condition.WHOLE]
        assert [path.rpartition("/")[2] for path in lost] == ["new"]
    for front in ("", "home/"):
        relative = {front + path.removeprefix("/home/"): text for path, text in wanted.items()}
        _, found = judged(made(data), relative)
        assert list(found.conditions.values()).count(Condition.WHOLE) == 3


@pytest.mark.parametrize("others", [(), (Part({"/other": "x"}),)], ids=["alone", "two"])
def test_a_directory_that_leads_to_the_files_shows_that_they_were_there(
    made: Make, others: tuple[Part, ...]
) -> None:
    """The disk is mounted at /mnt: /backup is the one that is empty, and /app what it copied."""
    data = Part(APP, "data", folders=("/backup/app",))
    for wanted in (moved("/mnt/backup"), moved("/backup")):
        with pytest.raises(ManifestError, match="--mount"):
            judged(made(*others, data), wanted)
    relative = {path[1:]: text for path, text in moved("/backup").items()}
    with pytest.raises(ManifestError, match="--root"):
        judged(made(*others, data), relative)
    below = Part(moved("/backup"), "data", folders=("/app",))
    with pytest.raises(ManifestError, match="--root"):
        judged(made(*others, below), {path[1:]: text for path, text in APP.items()})
    mount = Where(mounts=(GivenMount(str(len(others) + 1), "/mnt"),))
    _, found = judged(made(*others, data), moved("/mnt/backup"), mount)
    assert set(found.conditions.values()) == {Condition.MISSING}


@pytest.mark.parametrize("fstab", ["LABEL=root / ext4\n", None])
def test_another_filesystem_with_a_copy_is_not_mounted_where_files_were_lost(
    made: Make, fstab: str | None
) -> None:
    """The root has the directory of the lost files, and the other one has a copy of them."""
    top = root(fstab, None, "/backup/app")
    wanted = {**ROOT, **moved("/backup")}
    tree, found = judged(made(top, Part(APP, "data")), wanted)
    assert placed(tree) == {"/": 1}
    assert {found.conditions[path] for path in moved("/backup")} == {Condition.CANNOT_BE_TOLD}
    assert found.verdict is Verdict.UNKNOWN
    assert found.reason is not None and "--mount" in found.reason
    with pytest.raises(ManifestError, match="--mount"):
        judged(made(top, Part(APP, "data")), moved("/backup"))
    home = Where(mounts=(GivenMount("3", "/home"),))
    tree, found = judged(made(top, Part(APP, "data"), Part({"/u": "u"})), wanted, home)
    assert placed(tree) == {"/": 1, "/home": 3}
    assert {found.conditions[path] for path in moved("/backup")} == {Condition.CANNOT_BE_TOLD}


def test_a_name_in_other_case_is_that_of_the_files_on_fat() -> None:
    """A kernel that is asked for /efi there says that it is there, and that is /EFI."""
    assert may_show_at({"/EFI", "/efi"}.__contains__, "/boot/efi", ["/EFI/BOOT/X.EFI"])
    assert not may_show_at({"/boot"}.__contains__, "/boot/efi", ["/EFI/BOOT/X.EFI"])

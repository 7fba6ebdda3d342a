"""Mounts of which neither fstab nor crypttab tells: what they may have is not called lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.check import Findings
from nbdproxy.oracles.composite import TreeCheck
from nbdproxy.oracles.condition import Condition
from nbdproxy.oracles.locate import Where, locate, locate_all
from nbdproxy.oracles.plans import GivenMount
from nbdproxy.oracles.quick import QUICK
from tests.support.systems import LUKS, ROOT, Part, judged, manifest, placed, root

Make = Callable[..., MemoryDisk]

UNKNOWN, WHOLE, MISSING, DAMAGED = (
    Condition.CANNOT_BE_TOLD,
    Condition.WHOLE,
    Condition.MISSING,
    Condition.DAMAGED,
)
ONLY_ROOT = "LABEL=root / ext4\n"
OLD = {"/home/u/a.js": "before"}
NEW = {"/home/u/a.js": "after", "/home/u/b.js": "more"}
HOME = Part({"/u/a.js": "after", "/u/b.js": "more"}, "home")


def of_home(found: Findings) -> set[Condition]:
    """What became of the two files of /home; all others are whole."""
    assert all(c is WHOLE for path, c in found.conditions.items() if path not in NEW)
    return {found.conditions[path] for path in NEW}


@pytest.mark.parametrize("fstab", [ONLY_ROOT, None])
def test_what_is_whole_on_a_filesystem_that_no_fstab_names_is_not_lost(
    made: Make, fstab: str | None
) -> None:
    tree, found = judged(made(root(fstab, OLD), HOME), {**ROOT, **NEW})
    assert of_home(found) == {UNKNOWN}
    assert placed(tree) == {"/": 1}
    assert found.reason is not None
    assert "perhaps on partition 2, mounted at /home; say so with --mount" in found.reason
    told = Where(mounts=(GivenMount("2", "/home"),))
    assert of_home(judged(made(root(fstab, OLD), HOME), {**ROOT, **NEW}, told)[1]) == {WHOLE}


def test_what_is_whole_on_another_disk_is_not_lost(made: Make) -> None:
    system, data = made(root(ONLY_ROOT, OLD)), made(HOME)
    trees, wanted = locate_all(QUICK, [system, data], manifest({**ROOT, **NEW}), names=["s", "d"])
    for tree in trees:
        for path in NEW:
            why = "perhaps on partition 1 of d, mounted at /home; say so with --mount"
            assert tree.of(path) == why
    found = TreeCheck(QUICK, wanted, {}, trees[0]).check(system, None)
    assert found.conditions["/etc/passwd"] is WHOLE


def test_a_copy_that_is_not_mounted_changes_nothing_for_whole_files(made: Make) -> None:
    wanted = {**ROOT, **NEW, "/home/u/gone": "gone", "/home/u/lost": "lost"}
    there = {**NEW, "/home/u/lost": "older"}
    device = made(root(ONLY_ROOT, there), Part({**HOME.files, "/u/lost": "lost"}, "copy"))
    _, found = judged(device, wanted)
    assert found.conditions.pop("/home/u/lost") is UNKNOWN
    assert found.conditions.pop("/home/u/gone") is MISSING, "it is on neither"
    assert set(found.conditions.values()) == {WHOLE}
    older = Part({"/u/a.js": "before", "/u/b.js": "before", "/u/lost": "before"}, "copy")
    _, found = judged(made(root(ONLY_ROOT, there), older), wanted)
    lost = {path: c for path, c in found.conditions.items() if c is not WHOLE}
    assert lost == {"/home/u/lost": DAMAGED, "/home/u/gone": MISSING}


def test_a_filesystem_can_be_mounted_only_where_there_is_a_directory(made: Make) -> None:
    wanted = {**ROOT, "/home/u/a.js": "after"}
    copy = Part({"/a.js": "after"}, "copy")
    _, found = judged(made(root(ONLY_ROOT, OLD), copy), wanted)
    assert found.conditions["/home/u/a.js"] is UNKNOWN
    taken = made(
        root("LABEL=root / ext4\nLABEL=home /home/u ext4\n", None, "/home/u"),
        Part({"/a.js": "before"}, "home"),
        Part({"/u/a.js": "after", "/a.js": "after"}, "copy"),
    )
    _, found = judged(taken, wanted)
    assert found.conditions["/home/u/a.js"] is DAMAGED, "the fstab says what is there"


@pytest.mark.parametrize("fstab", [ONLY_ROOT, None])
@pytest.mark.parametrize("old", [OLD, {}, {"/home/u/a.js": "after, cut"}])
def test_what_may_be_hidden_is_not_lost_because_of_an_older_file(
    made: Make, fstab: str | None, old: dict[str, str]
) -> None:
    _, found = judged(made(root(fstab, old), Part(raw=LUKS)), {**ROOT, **NEW})
    assert of_home(found) == {UNKNOWN}
    assert found.reason is not None and "partition 2 is LUKS1" in found.reason


def test_a_whole_file_beside_it_shows_that_a_lost_one_is_lost(made: Make) -> None:
    device = made(root(ONLY_ROOT, {"/etc/short": "s", **OLD}), Part(raw=LUKS))
    wanted = {**ROOT, **NEW, "/etc/lost": "lost", "/etc/short": "short"}
    _, found = judged(device, wanted)
    assert found.conditions.pop("/etc/lost") is MISSING
    assert found.conditions.pop("/etc/short") is Condition.SHORT
    assert of_home(found) == {UNKNOWN}


def test_an_empty_file_shows_nothing(made: Make) -> None:
    device = made(root(ONLY_ROOT, {**OLD, "/home/u/empty": ""}), Part(raw=LUKS))
    _, found = judged(device, {**ROOT, **NEW, "/home/u/empty": ""})
    assert of_home(found) == {UNKNOWN}
    empty = Part({"/u/empty": "", "/u/a.js": "before"}, "home")
    _, found = judged(made(root(ONLY_ROOT, OLD), empty), {**ROOT, **NEW, "/home/u/empty": ""})
    assert found.conditions["/home/u/a.js"] is DAMAGED


def test_what_was_whole_at_the_instant_that_is_judged_is_judged(made: Make) -> None:
    """At the end it is another version, and nothing beside it is whole."""
    now = made(root(ONLY_ROOT, {"/home/u/a.js": "after"}), Part(raw=LUKS))
    later = made(root(ONLY_ROOT, {"/home/u/a.js": "even later"}), Part(raw=LUKS))
    wanted = manifest({**ROOT, "/home/u/a.js": "after", "/home/u/lost": "lost"})
    tree, _ = locate(QUICK, later, wanted, other=now)
    found = TreeCheck(QUICK, wanted, {}, tree).check(now, None)
    assert found.conditions.pop("/home/u/lost") is MISSING
    assert set(found.conditions.values()) == {WHOLE}


def test_a_file_that_was_deleted_before_the_end_was_there(made: Make) -> None:
    now = made(root(ONLY_ROOT, {"/home/u/a.js": "after"}), Part(raw=LUKS))
    later = made(root(ONLY_ROOT, None, "/home/u"), Part(raw=LUKS))
    wanted = manifest({**ROOT, "/home/u/a.js": "after"})
    tree, _ = locate(QUICK, later, wanted, other=now)
    assert TreeCheck(QUICK, wanted, {}, tree).check(now, None).conditions["/home/u/a.js"] is (WHOLE)


def test_where_an_fstab_says_why_nothing_else_is_said(made: Make) -> None:
    """A file of a mount that is on no disk here is not perhaps on another filesystem."""
    top = root("LABEL=root / ext4\nUUID=77 /home ext4\n", OLD)
    device = made(top, Part({"/a.js": "after"}, "copy"), Part(raw=LUKS))
    tree, found = judged(device, {**ROOT, "/home/u/a.js": "after"})
    assert found.conditions["/home/u/a.js"] is UNKNOWN
    assert tree.doubtful == {} and "/home is on UUID=77" in str(found.reason)

"""A guest with several filesystems on two disks: each file is judged where the guest has it.

/boot, / and something encrypted on one disk, /home on another; on each filesystem one file was
flushed and one was not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.oracles.manifest import dump
from tests.support.nbd_client import WRITE, NbdClient, Op
from tests.support.proxies import Proxy
from tests.support.serving import nbdproxy
from tests.support.systems import LUKS, Part, disk, ident, manifest, with_files

BLOCK = 4096
FSTAB = (
    "LABEL=root / ext4 defaults 0 1\n"
    f"UUID={ident(1)} /boot ext4 defaults 0 2\n"
    "/dev/mapper/vault /vault ext4 defaults 0 2\n"
    "LABEL=home /home ext4 defaults 0 2\n"
)
FLUSHED = {"/boot/vmlinuz": "kernel\n", "/etc/passwd": "users\n", "/home/u.txt": "mine\n"}
UNFLUSHED = {"/boot/initrd": "modules\n", "/etc/motd": "hello\n", "/home/v.txt": "new\n"}
NEVER = {"/home/w.txt": "never\n", "/boot/config": "never\n"}
SECRET = {"/vault/key": "secret\n"}


@dataclass(frozen=True)
class Guest:
    """The recordings' folder, those of the two disks, and a manifest of all files."""

    runs: Path
    system: Path
    home: Path
    files: Path


def send(client: NbdClient, before: bytes, after: bytes) -> None:
    """Write the blocks in which two disks differ, and wait for the replies."""
    places = range(0, len(before), BLOCK)
    ops = [
        Op(WRITE, at, data=after[at : at + BLOCK])
        for at in places
        if before[at : at + BLOCK] != after[at : at + BLOCK]
    ]
    assert ops and not any(reply.error for reply in client.do(*ops))


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """A recording of both disks. Nobody may change it."""
    folder = tmp_path_factory.mktemp("guest")
    crypttab = f"vault PARTUUID={ident(103)} none luks\n"
    root = {"/etc/fstab": FSTAB, "/etc/crypttab": crypttab}
    steps: list[list[bytes]] = [
        [
            disk(
                folder / "system",
                Part({}, "boot"),
                Part(root, "root", folders=("/boot", "/home", "/vault")),
                Part(raw=LUKS),
            ),
            disk(folder / "home", Part({}, "home"), first=5),
        ]
    ]
    for name, files in (("flushed", FLUSHED), ("unflushed", UNFLUSHED)):
        system, home = steps[-1]
        for number, point in ((1, "/boot"), (2, "/etc")):
            own = {p if number == 2 else p[5:]: t for p, t in files.items() if p.startswith(point)}
            system = with_files(folder / f"{name}{number}", system, number, own)
        own = {p[5:]: t for p, t in files.items() if p.startswith("/home")}
        steps.append([system, with_files(folder / f"{name}home", home, 1, own)])
    images = [folder / "system.img", folder / "home.img"]
    for image, content in zip(images, steps[0], strict=True):
        image.write_bytes(content)
    with Proxy(folder / "proxy", *images, "--record", folder / "run", exports=2) as proxy:
        clients = [NbdClient(uri) for uri in proxy.uris]
        for number, client in enumerate(clients):
            send(client, steps[0][number], steps[1][number])
            client.flush()
        for number, client in enumerate(clients):
            send(client, steps[1][number], steps[2][number])
            client.disc()
        assert proxy.stop() == 0
    listed = folder / "files"
    listed.write_text(dump(manifest({**FLUSHED, **UNFLUSHED, **NEVER, **SECRET})))
    run = folder / "run"
    return Guest(run, run / "system.img", run / "home.img", listed)


def lost(said: str) -> dict[str, tuple[str, str | None]]:
    """What a table of one cell says of each file in its worst state, unless it is whole."""
    (cell,) = json.loads(said)["cells"]
    found: dict[str, Any] = cell["worst"]["files"]
    return {path: (one["condition"], one["cause"]) for path, one in found.items()}


CELL = ("--mode", "none", "--failure", "host-power-loss")
UNSENT = dict.fromkeys(NEVER, ("missing", "never-sent"))
HIDDEN = dict.fromkeys(SECRET, ("cannot-be-told", None))
EXPECTED = {**dict.fromkeys(UNFLUSHED, ("missing", "unflushed")), **UNSENT, **HIDDEN}


def test_each_file_is_blamed_on_its_own_filesystem(guest: Guest) -> None:
    for runs in ((guest.runs,), (guest.system, guest.home), (guest.home, guest.system)):
        words = ("replay", *runs, "--files", guest.files, *CELL, "--list", "--json")
        said = nbdproxy(*words, code=1).stdout
        assert lost(said) == EXPECTED
        told = json.loads(said)
        assert {(one["point"], one["partition"]) for one in told["mounts"]} == {
            ("/", 2),
            ("/boot", 1),
            ("/home", 1),
        }
        assert {Path(one["recording"]).name for one in told["recordings"]} == {
            "system.img",
            "home.img",
        }


WRONG = "no state that was looked at has a directory /wrong/here: --root is wrong, or the guest"


def test_a_root_that_was_never_there_tells_nothing(guest: Guest, tmp_path: Path) -> None:
    """It is not the guest that lost files of which nobody knows where they are."""
    files = tmp_path / "files"
    files.write_text(dump(manifest({"motd": "hello\n", "passwd": "users\n"})))
    for runs in ((guest.system,), (guest.home, guest.system)):
        words = ("replay", *runs, "--files", files, *CELL)
        found = lost(nbdproxy(*words, "--root", "wrong/here", "--list", "--json", code=2).stdout)
        assert set(found.values()) == {("cannot-be-told", None)}
        assert WRONG in nbdproxy(*words, "--root", "/wrong/here", code=2).stdout
        found = lost(nbdproxy(*words, "--root", "/etc", "--list", "--json", code=1).stdout)
        assert found == {"/etc/motd": ("missing", "unflushed")}
    words = ("--files", files, "--root", "/wrong/here", "--states", "2", "--json")
    said = json.loads(nbdproxy("explore", guest.system, *words, code=2).stdout)
    assert WRONG in said["unknown"][0]["reason"]


def test_one_of_several_disks_is_named_with_what_is_mounted(guest: Guest, tmp_path: Path) -> None:
    moved = {path.replace("/home", "/people"): text for path, text in FLUSHED.items()}
    listed = tmp_path / "files"
    listed.write_text(dump(manifest(moved)))
    words = ("replay", guest.runs, "--files", listed, *CELL, "--json")
    for home in ("home.img", "home.img/1", guest.home, "home.img/LABEL=home"):
        said = nbdproxy(*words, "--mount", f"{home}:/people", code=0).stdout
        assert ("/people", 1) in {(m["point"], m["partition"]) for m in json.loads(said)["mounts"]}
    told = ("--mount", "system.img/2:/", "--mount", "home.img/1:/people")
    said = nbdproxy(*words, *told, code=0).stdout  # the fstab there tells of /boot
    assert {m["point"] for m in json.loads(said)["mounts"]} == {"/", "/boot", "/home", "/people"}
    wrong = nbdproxy(*words, "--mount", "home:/people", code=2).stderr
    assert "--mount home:/people: no filesystem is called so; there are: partition 1 of " in wrong
    assert "the disks are home.img, system.img" in wrong


def test_a_disk_that_was_not_named_is_missed_in_words(guest: Guest) -> None:
    words = ("replay", guest.system, "--files", guest.files, *CELL)
    found = lost(nbdproxy(*words, "--list", "--json", code=1).stdout)
    expected = {p: o for p, o in EXPECTED.items() if not p.startswith("/home")}
    others = {p for p in (*FLUSHED, *UNFLUSHED, *NEVER) if p.startswith("/home")}
    assert found == {**expected, **dict.fromkeys(others, ("cannot-be-told", None))}
    said = nbdproxy(*words, code=1).stdout
    assert "3 files cannot be told: /home is on LABEL=home, which is not seen" in said
    assert "1 file cannot be told: /vault is on /dev/mapper/vault, which is not read here: " in said
    assert "partition 3 is LUKS1" in said
    assert "what became of 4 more cannot be told." in said


def test_nothing_lost_and_something_hidden_is_exit_code_2(guest: Guest, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.write_text(dump(manifest({**FLUSHED, **SECRET})))
    said = nbdproxy("replay", guest.runs, "--files", files, *CELL, code=2).stdout
    assert "Whose fault: as far as can be told nobody's; what became of 1 of 4 files" in said
    files.write_text(dump(manifest(FLUSHED)))
    nbdproxy("replay", guest.runs, "--files", files, *CELL, code=0)


def test_an_instant_is_the_same_for_all_disks(guest: Guest) -> None:
    words = ("replay", guest.runs, "--files", guest.files, *CELL, "--list", "--json")
    early = lost(nbdproxy(*words, "--at", "time:0", code=1).stdout)
    assert {path for path, one in early.items() if one[0] == "missing"} == {
        *(path for path in {**FLUSHED, **UNFLUSHED, **NEVER}),
    }


def test_the_story_of_a_file_says_where_it_is(guest: Guest) -> None:
    words = ("explain", guest.system, "/boot/initrd", "/etc/passwd")
    for more in ((), ("--files", guest.files)):
        said = nbdproxy(*words, *more, "--at", "end", "--mode", "none", code=1).stdout
        assert "/boot/initrd, 8 bytes, on partition 1 at /boot\n" in said
        assert "/etc/passwd, 6 bytes, on partition 2 at /\n" in said
        assert "missing, unflushed; at best whole" in said
        assert "bytes 0 to 7: request" in said
    hidden = nbdproxy("explain", guest.system, "/vault/key", "--files", guest.files, code=2).stdout
    assert "partition 3 is LUKS1" in hidden
    nbdproxy("explain", guest.system, "--files", guest.files, code=1)


def test_explored_states_are_minimized_to_the_write_of_the_right_file(
    guest: Guest, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    files.write_text(dump(manifest({"/boot/initrd": "modules\n", "/etc/passwd": "users\n"})))
    words = ("explore", guest.system, "--files", files, "--states", "80", "--at", "end")
    found = json.loads(nbdproxy(*words, "--workers", "2", "--json", code=1).stdout)
    state = found["failing"][0]["state"] if "failing" in found else None
    assert state is not None, found
    minimal = nbdproxy("minimize", guest.system, "--state", state, "--files", files, code=1).stdout
    assert "/boot" in minimal and "/etc" not in minimal


def test_one_state_shows_each_filesystem(guest: Guest) -> None:
    said = nbdproxy("check", guest.system, "--files", guest.files, code=1).stdout.splitlines()
    assert "  partition 1, at /boot" in said and "  partition 2, at /" in said
    assert said.count("  fsck     clean") == 2
    assert any(line.startswith("  files    4 whole, 4 cannot-be-told, 1 missing") for line in said)
    told = json.loads(nbdproxy("check", guest.system, "--json", code=0).stdout)
    assert [one["name"] for one in told["filesystems"]] == [
        "partition 1, at /boot",
        "partition 2, at /",
    ]


def test_a_manifest_lists_the_whole_tree(guest: Guest) -> None:
    said = nbdproxy("manifest", guest.system, code=2)
    listed = said.stdout
    assert "left out: /vault is on /dev/mapper/vault, which is not read here: partition 3" in (
        " ".join(said.stderr.split())
    )
    assert "left out: /home is on LABEL=home" in said.stderr
    for path in ("/boot/vmlinuz", "/etc/passwd", "/etc/fstab"):
        assert f"  {path}\n" in listed
    below = nbdproxy("manifest", f"{guest.system}@end", "--under", "/boot", code=0).stdout
    assert "/boot/initrd" in below and "/etc" not in below
    told = ("--mount", "1:/efi", "--mount", "LABEL=root:/")
    said = nbdproxy("manifest", guest.system, *told, code=2)  # its fstab tells of all others
    assert "/efi/vmlinuz" in said.stdout and "left out: /home is on LABEL=home" in said.stderr
    for wrong, sentence in (
        (("--mount", "boot"), "--mount 1:/boot"),
        (("--mount", "9:/"), "no filesystem is called so; there are: partition 1, partition 2"),
        (("--mount", "1:/", "--partition", "1"), "drop it, or --mount"),
    ):
        assert sentence in nbdproxy("manifest", guest.system, *wrong, code=2).stderr
    several = nbdproxy("replay", guest.runs, "--files", guest.files, "--partition", "1", code=2)
    assert "--mount" in several.stderr

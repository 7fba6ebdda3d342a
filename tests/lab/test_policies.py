"""Policies under real guests: what fsync says on a disk whose flush fails, and what SQLite finds.

Each test serves a disk through a recording nbdproxy to a guest, QEMU's own NBD client in between.

Not covered: fsync on a healthy disk, and SQLite on a plain image (`test_sqlite`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nbdproxy.crash.states.naming import Choice, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import open_state
from nbdproxy.errors import LabError
from nbdproxy.lab import run as guest
from nbdproxy.lab import sqlite_image
from nbdproxy.lab.guest import disk
from nbdproxy.lab.guest.build import Lab, build_lab
from nbdproxy.lab.guest.cache import silent
from nbdproxy.lab.workloads import databases, fsyncs, kernel_log, workloads
from nbdproxy.persistence.model import Durability, Level, Options
from nbdproxy.recording.notes import NoteKind
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy, tool

pytestmark = pytest.mark.lab

MIB = 1 << 20


@pytest.fixture(scope="module")
def lab() -> Lab:
    return build_lab()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    disk.format_disk(path, 64 * MIB)
    return path


def serve(image: Path, *options: str | Path) -> ForkedServer:
    folder = image.parent
    return ForkedServer(
        folder, image, "--record", folder / "run", "--control", folder / "ctl", *options
    )


def run(
    lab: Lab,
    server: ForkedServer,
    workload: workloads.Workload,
    end: str = "cut",
    on_line: Callable[[str], None] = silent,
) -> str:
    """Run a workload on what the server serves; return what the guest printed."""
    return guest.run(
        lab,
        workload,
        f"nbd+unix:///?socket={server.socket}",
        ending=workloads.parse_ending(end),
        cache_mode="none",
        cpus=1,
        on_line=on_line,
    ).serial


@pytest.mark.parametrize(
    ("nth", "failed", "later", "stored"),
    [
        # Of the journal's commit for the first call: ext4 aborts the journal. The next call has
        # nothing to write and succeeds though the data is lost; nothing can be written any more.
        (2, 1, ["ok", "EROFS", "EROFS", "EROFS", "EROFS"], None),
        # A call's own: ext4 goes on. What is lost here is written again and saved by call 5.
        (5, 3, ["ok", "ok", "ok"], 5),
        # The same for the last write: call 6 says ok, the guest reads the write back, it is gone.
        (7, 5, ["ok"], 3),
    ],
)
def test_the_application_sees_eio_once(
    lab: Lab, image: Path, *, nth: int, failed: int, later: list[str], stored: int | None
) -> None:
    """The first flush is the mount's; which one is whose was seen with Linux 6.1."""
    with serve(image, "--policy", "fsyncgate", "--set", f"nth={nth}") as server:
        serial = run(lab, server, workloads.fsync_probe(call="fdatasync"))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    said = fsyncs.probed(serial)
    calls = [said[f"fdatasync {number}"] for number in range(1, 7)]
    writes = [said[f"write {number}"] for number in (1, 3, 5)]
    aborts = "EROFS" in later
    if aborts and said["stored"] == "EIO":  # Linux 6.12 lets nothing through any more, 6.1 writes
        later = [one.replace("EROFS", "EIO") for one in later]
        assert writes == ["ok", "EIO", "EIO"]
    else:
        assert writes == ["ok", "ok", "ok"]
        assert said["stored"] == "write 5"  # what was lost is there until the power goes
    assert calls == ["ok"] * (failed - 1) + ["EIO"] + later
    assert aborts == any("Aborting journal" in text for text in kernel_log.kernel_errors(serial))
    source = RecordedSource(image.parent / "run")
    check_fsyncgate(source, nth, image)
    source.close()
    if stored is not None:
        tool("e2fsck", "-y", "-E", "journal_only", image)
        tool("debugfs", "-R", f"dump /probe {image.parent / 'probe'}", image)
        probe = (image.parent / "probe").read_bytes()
        assert probe[:16].decode().strip() == f"write {stored}"


def check_fsyncgate(source: RecordedSource, nth: int, image: Path) -> None:
    """The recording tells which flush failed and what was lost, and foretells the image."""
    table, options = source.table, Options(fsyncgate=True)
    [fault] = [json.loads(note.text) for note in source.notes if note.kind is NoteKind.FAULT]
    assert (fault["rule"], fault["command"]) == ("fsyncgate/fails once", "flush")
    flushes = np.flatnonzero(table.is_flush)
    assert np.flatnonzero(table.error).tolist() == [flushes[nth - 1]]
    assert fault["seq"] == table.seq[flushes[nth - 1]]
    assert (Durability(table, options).lost_from < source.events).any()
    assert not (Durability(table).lost_from < source.events).any()
    state = open_state(source, StateId(source.events, Level.FLUSHED, Choice.MUST, options))
    assert state.pread(0, state.size) == image.read_bytes()
    state.close()


@pytest.mark.parametrize(
    ("policy", "probability"), [("torn-writes", 0.2), ("misdirected-writes", 0.1)]
)
def test_sqlite_finds_what_a_policy_of_the_gallery_did(
    lab: Lab, image: Path, policy: str, probability: float
) -> None:
    """On ext2, which has neither journal nor checksums: ext4 would refuse the mount itself."""
    disk.format_disk(image, 64 * MIB, fs="ext2")

    def listen(line: str) -> None:
        if databases.committed(line) == 5:
            setting = f"probability={probability}"
            nbdproxy("ctl", image.parent / "ctl", "policy", policy, "--set", setting)

    with serve(image, "--seed", "1") as server:
        workload = workloads.sqlite(transactions=60)
        assert databases.committed(run(lab, server, workload, "umount", listen)) == 60
        found = databases.checked(run(lab, server, workloads.sqlite_check()))
    assert found.mounted
    assert found.files
    assert found.integrity != ("ok",)
    assert found.integrity or any("malformed" in text for text in found.errors)


@pytest.fixture(scope="module")
def filled(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with a database of 40 transactions."""
    path = tmp_path_factory.mktemp("filled") / "disk.img"
    disk.format_disk(path, 64 * MIB)
    first = workloads.sqlite(synchronous="full", transactions=40)
    guest.run(lab, first, path, ending=workloads.parse_ending("sync"), cpus=1)
    return path


@pytest.mark.parametrize("policy", ["torn-writes", "misdirected-writes"])
def test_sqlite_finds_what_the_disk_did(
    lab: Lab, image: Path, filled: Path, tmp_path: Path, policy: str
) -> None:
    """Only the database's own blocks are struck, so that ext4 itself can be mounted."""
    path = image.parent / "mine.toml"
    action = {
        "torn-writes": 'action = "tear"\nkeep = "front"\nsectors = 1',
        "misdirected-writes": 'action = "misdirect"\nshift = -4096',
    }[policy]
    path.write_text(
        f'summary = "{policy} of pages full of rows"\nimitates = "see {policy}"\n'
        f'[[rule]]\ncommand = "write"\nfile = "/db/test.db"\nprobability = 0.5\n{action}\n'
    )
    shutil.copyfile(filled, image)
    with serve(image, "--policy", path) as server:
        serial = run(lab, server, VACUUM, "sync")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    found = databases.checked(serial)
    assert found.mounted
    assert found.integrity != ("ok",)
    source = RecordedSource(image.parent / "run")
    assert [note for note in source.notes if note.kind is NoteKind.FAULT]
    source.close()
    # The image is pristine: the faults were above it.
    (tmp_path / "copied").mkdir()
    honest = sqlite_image.check_image(image, tmp_path / "copied")
    assert (honest.integrity, honest.wrong, honest.errors) == (("ok",), 0, ())


VACUUM = replace(
    workloads.sqlite_check(),
    script="echo 'PRAGMA synchronous = FULL; DELETE FROM entry WHERE txn <= 10; VACUUM;' |"
    "  /tools/bin/sqlite3 -batch db/test.db; sync; echo 3 > /proc/sys/vm/drop_caches\n"
    + databases.check_script(),
)
"""Writes the whole database anew, then reads it from the disk and checks it."""


def commits_until_the_cut(
    lab: Lab, image: Path, workload: workloads.Workload, count: int, *, signalled: bool = False
) -> int:
    """Cut the power when so many transactions were told; return how many were in the end."""
    told: list[str] = []
    with serve(image, "--policy", "drop-unflushed") as server:

        def listen(line: str) -> None:
            told.append(line)
            if databases.committed(line) != count:
                return
            if signalled:
                server.signal(signal.SIGTERM)
            else:
                nbdproxy("ctl", image.parent / "ctl", "cut")

        with contextlib.suppress(LabError):  # a guest whose disk went away may not end well
            run(lab, server, workload, "cut", listen)
        assert server.wait() == 0, server.log
    committed = databases.committed("\n".join(told))
    assert committed >= count
    return committed


@pytest.mark.parametrize(
    ("synchronous", "journal", "count", "signalled", "undone"),
    [
        ("full", "truncate", 3, True, 0),
        ("full", "wal", 25, False, 0),
        ("extra", "delete", 60, True, 0),
        # Removing the journal is the commit, and `full` does not sync the folder it was in.
        ("full", "delete", 40, False, 1),
    ],
)
def test_what_is_committed_is_kept(
    lab: Lab,
    image: Path,
    *,
    synchronous: str,
    journal: str,
    count: int,
    signalled: bool,
    undone: int,
) -> None:
    """All that the guest told, also while the power was being cut; never one too few."""
    workload = workloads.sqlite(synchronous=synchronous, journal=journal, transactions=400)
    committed = commits_until_the_cut(lab, image, workload, count, signalled=signalled)
    code, said = sqlite_image.judge(image, committed=committed, may_lose=undone)
    assert code == sqlite_image.SOUND, said
    assert committed < 400, "the cut came too late to be one"


def test_what_is_not_synced_is_lost(lab: Lab, image: Path) -> None:
    workload = workloads.sqlite(synchronous="off", transactions=1000)
    committed = commits_until_the_cut(lab, image, workload, 50)
    assert sqlite_image.judge(image, committed=committed)[0] == sqlite_image.LOST

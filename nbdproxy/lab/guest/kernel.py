"""The guest's kernel: Debian's cloud kernel package, fetched and unpacked without root.

Guarantees: modules come out uncompressed and in an order in which each finds what it depends on,
read from the modules themselves (the package has no modules.dep: that is made when it is
installed). Covers Debian 12 and 13. Does not cover other distributions and other architectures
than amd64.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from nbdproxy.errors import LabError
from nbdproxy.lab.guest import tools

META_PACKAGE = "linux-image-cloud-amd64"

BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ata_piix", "nvme", "ext4")
"""What every guest loads: the disks it may be given, and ext4."""

FILESYSTEM_MODULES = {
    "ext4": ("quota_v2",),
    "xfs": ("xfs",),
    "btrfs": ("xxhash_generic", "blake2b_generic", "btrfs"),
    "vfat": ("vfat", "nls_cp437", "nls_ascii", "nls_utf8"),
    "exfat": ("exfat", "nls_utf8"),
    "ntfs": ("fuse",),
}
"""What a guest loads only when it mounts such a disk: drivers, and what they ask for by name."""

MOUNT_PROGRAMS = {"ntfs": "ntfs-3g"}
"""What mounts a filesystem that Debian's kernel has no driver for, through FUSE."""

CLIENT_MODULES = ("virtio_net", "nbd")
"""What a guest loads only when its kernel is to be the NBD client: a network card, and that."""

LOG_MODULES = ("dm_log_writes",)
"""What a guest loads only when its kernel is to log all writes itself: see `dm_log`."""

VOLUME_MODULES = ("dm_snapshot", "dm_thin_pool")
"""What a guest loads only when it has LVM's snapshots and thin volumes."""

CONSOLE_MODULES = ("virtio_console",)
"""What a guest loads only when it is to be talked to: a port for that."""

GROUPS: dict[str, tuple[str, ...]] = {
    "boot": BOOT_MODULES,
    **FILESYSTEM_MODULES,
    "nbd": CLIENT_MODULES,
    "log-writes": LOG_MODULES,
    "volumes": VOLUME_MODULES,
    "console": CONSOLE_MODULES,
}

_INDISPENSABLE = frozenset({"virtio_pci", "virtio_blk", "ext4"})


def fetch(into: Path) -> None:
    """Put `vmlinuz`, `modules/*.ko` and the load orders `modules/GROUP.order` into a directory."""
    package = _resolve(tools.require(["apt-cache"])["apt-cache"])
    unpacked = into / "unpacked"
    fetched = unpack(package, unpacked)
    kernels = sorted((unpacked / "boot").glob("vmlinuz-*"))
    trees = sorted(p.parent for p in unpacked.glob("**/modules.builtin"))
    if not kernels or not trees:
        raise LabError(f"{package} holds no kernel with modules; run: sudo apt-get update")
    kernels[0].rename(into / "vmlinuz")
    collect(trees[0], into / "modules")
    (into / "package").write_text(f"{fetched}\n")
    shutil.rmtree(unpacked)


def unpack(package: str, into: Path) -> str:
    """Put what one of Debian's packages holds into a new folder; return its file's name.

    Fetched by apt, which checks it. Raises LabError.
    """
    where = tools.require(["apt-get", "dpkg-deb"])
    into.mkdir()
    tools.run_tool([where["apt-get"], "download", "-qq", package], cwd=into)
    debs = sorted(into.glob("*.deb"))
    if not debs:
        raise LabError(f"apt-get downloaded no {package}; run: sudo apt-get update")
    tools.run_tool([where["dpkg-deb"], "-x", debs[0], into])
    debs[0].unlink()
    return debs[0].name


def _resolve(apt_cache: Path) -> str:
    """Return the real package that Debian's meta package stands for at present."""
    try:
        listing = tools.run_tool([apt_cache, "depends", META_PACKAGE])
    except LabError:
        listing = ""
    found = re.search(r"Depends:\s*(linux-image-\S+)", listing)
    if not found:
        raise LabError(f"apt knows no {META_PACKAGE}; run: sudo apt-get update")
    return found[1]


def collect(tree: Path, into: Path) -> None:
    """Copy the modules of every group out of an unpacked `lib/modules/RELEASE` directory."""
    into.mkdir()
    loaded = {_name(Path(line)) for line in (tree / "modules.builtin").read_text().split()}
    files = {_name(path): path for path in sorted(tree.rglob("*.ko*"))}
    for group, wanted in GROUPS.items():
        order = load_order(wanted, files, loaded)
        for name in order:
            (into / f"{name}.ko").write_bytes(read_module(files[name]))
        (into / f"{group}.order").write_text("".join(f"{name}\n" for name in order))
        if group == "boot":
            loaded |= set(order)  # insmod would complain of a second time


def load_order(wanted: Sequence[str], files: dict[str, Path], loaded: Iterable[str]) -> list[str]:
    """Return the modules to load, each behind all it depends on, without those there already."""
    order: list[str] = []
    seen = set(loaded)

    def visit(name: str, *, indispensable: bool) -> None:
        if name in seen:
            return
        seen.add(name)
        if name not in files:
            # A soft dependency names what it needs, say crc32c, which a _generic module provides.
            if f"{name}_generic" in files:
                visit(f"{name}_generic", indispensable=False)
            elif indispensable:
                raise LabError(f"{META_PACKAGE} has no module {name}; run: sudo apt-get update")
            return
        hard, soft = dependencies(read_module(files[name]))
        for other in hard:
            visit(other, indispensable=True)
        for other in soft:
            visit(other, indispensable=False)
        order.append(name)

    for name in wanted:
        visit(name, indispensable=name in _INDISPENSABLE)
    return order


def dependencies(module: bytes) -> tuple[list[str], list[str]]:
    """Return what a module needs, and what it would like loaded first, from its .modinfo."""
    hard: list[str] = []
    soft: list[str] = []
    for found in re.findall(rb"\0depends=([^\0]*)\0", module):
        hard += [_canonical(word) for word in found.decode().split(",") if word]
    for found in re.findall(rb"\0softdep=pre:([^\0]*)\0", module):
        soft += [_canonical(word) for word in found.decode().split("post:")[0].split()]
    return hard, soft


def read_module(path: Path) -> bytes:
    """Return a module's bytes, decompressed: Debian 13 ships .ko.xz, Debian 12 plain .ko."""
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".ko":
            return data
        case suffix:
            raise LabError(f"{path.name} is compressed as {suffix}, which the lab cannot read")


def _name(path: Path) -> str:
    return _canonical(path.name.split(".ko")[0])


def _canonical(name: str) -> str:
    return name.replace("-", "_")

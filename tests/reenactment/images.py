"""qcow2 files of every kind that people have, and what a guest sees of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.support.proxies import MIB
from tests.support.serving import tool

SIZE = 8 * MIB
CLUSTER = 128 * 1024
"""The largest that is made here. Of less a driver need not trim anything."""
DATA_FILE = "disk.data"


def guests(image: Path, data_file: Path | None = None) -> bytes:
    """What a guest sees of a qcow2 file."""
    node = f"driver=qcow2,file.driver=file,file.filename={image}"
    if data_file is not None:
        node += f",data-file.driver=file,data-file.filename={data_file}"
    out = image.with_suffix(".guest")
    tool("qemu-img", "convert", "--image-opts", "-O", "raw", node, out)
    found = out.read_bytes()
    out.unlink()
    return found


def _content(folder: Path) -> Path:
    """A raw disk with data that compresses, and holes."""
    dice = random.Random(3)
    pieces = [
        dice.randbytes(8192) + bytes(57344) if dice.random() < 0.6 else bytes(65536)
        for _ in range(SIZE // 65536)
    ]
    raw = folder / "content.raw"
    raw.write_bytes(b"".join(pieces))
    return raw


def _new(folder: Path, *options: str) -> Path:
    image = folder / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", *options, image, str(SIZE))
    return image


def _full(folder: Path, *options: str) -> Path:
    image = folder / "disk.qcow2"
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, _content(folder), image)
    return image


def _on_backing_file(folder: Path) -> Path:
    """What Proxmox makes of a volume with snapshots; the name of the lower file is relative."""
    _full(folder).rename(folder / "base.qcow2")
    options = ("-F", "qcow2", "-b", "base.qcow2", "-o", "extended_l2=on,cluster_size=128k")
    return _new(folder, *options)


def _on_raw(folder: Path) -> Path:
    """On a raw file, by its full name, through another one between them."""
    _new(folder, "-F", "raw", "-b", str(_content(folder))).rename(folder / "middle.qcow2")
    return _new(folder, "-F", "qcow2", "-b", str(folder / "middle.qcow2"))


def _with_snapshot(folder: Path) -> Path:
    image = _full(folder)
    tool("qemu-img", "snapshot", "-c", "one", image)
    return image


def _with_data_file(folder: Path) -> Path:
    """Whose data is in a raw file beside it, by its full name."""
    return _new(folder, "-o", f"data_file={folder / DATA_FILE},data_file_raw=on")


KINDS: dict[str, Callable[[Path], Path]] = {
    "new": _new,
    "full": _full,
    "on-backing-file": _on_backing_file,
    "on-raw": _on_raw,
    "zlib": lambda folder: _full(folder, "-c"),
    "zstd": lambda folder: _full(folder, "-c", "-o", "compression_type=zstd"),
    "snapshot": _with_snapshot,
    "data-file": _with_data_file,
    "small-clusters": lambda folder: _new(folder, "-o", "cluster_size=4k,lazy_refcounts=on"),
    "version-2": lambda folder: _full(folder, "-o", "compat=0.10"),
}

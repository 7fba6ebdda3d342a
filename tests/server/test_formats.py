"""Images of other formats, each made by qemu-img: told what they are, never taken for raw bytes.

Not covered: reading DMG, Bochs and cloop images, which qemu-img cannot make; and encrypted ones.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from nbdproxy.disks.formats import FORMATS, ImageFormat, format_of, format_of_file
from tests.support.proxies import MIB, Proxy
from tests.support.recordings import state
from tests.support.serving import nbdproxy, tool

SIZE = 4 * MIB
MADE = {
    "qcow": (),
    "vmdk": (),
    "vmdk, a descriptor": ("-o", "subformat=monolithicFlat"),
    "vmdk, a stream": ("-o", "subformat=streamOptimized"),
    "vdi": (),
    "vhdx": (),
    "vpc": (),
    "vpc, fixed": ("-o", "subformat=fixed,force_size=on"),
    "qed": (),
    "parallels": (),
}
WRITABLE = sorted(MADE.keys() - {"vmdk, a stream"})
CONTENT = random.Random(1).randbytes(MIB) + bytes(SIZE - MIB)


def make(folder: Path, kind: str) -> tuple[Path, str]:
    """Make an image; returns its file and its format."""
    raw, image, form = folder / "raw", folder / "image", kind.partition(",")[0]
    raw.write_bytes(CONTENT)
    tool("qemu-img", "convert", "-f", "raw", "-O", form, *MADE[kind], raw, image)
    return image, form


def told(*words: str | Path) -> str:
    """The one sentence with which a command refuses."""
    said = nbdproxy(*words, code=2).stderr
    assert said.startswith("nbdproxy: ")
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("kind", MADE)
def test_it_is_told_what_it_is_and_served_as_raw_on_request_only(tmp_path: Path, kind: str) -> None:
    image, form = make(tmp_path, kind)
    assert format_of_file(image) is ImageFormat(form)
    said = told("serve", image, "--run", "true")
    assert FORMATS[ImageFormat(form)].said in said
    assert f"add --format {form} to serve the guest's disk in it" in said
    assert "or --format raw" in said
    with Proxy(tmp_path / "proxy", image, "--format", "raw") as proxy, proxy.client() as client:
        assert client.read(0, 512) == image.read_bytes()[:512].ljust(512, b"\0")


@pytest.mark.parametrize("kind", WRITABLE)
def test_the_guests_disk_is_read_written_and_recorded(tmp_path: Path, kind: str) -> None:
    image, form = make(tmp_path, kind)
    run = tmp_path / "run"
    with Proxy(tmp_path / "proxy", image, "--format", form, "--record", run) as proxy:
        with proxy.client() as client:
            size = client.size
            assert client.read(0, SIZE) == CONTENT
            client.write(2 * MIB + 512, b"A" * 1024)  # some of QEMU's drivers want sectors
            client.flush()
        assert proxy.stop() == 0
    expected = bytearray(CONTENT.ljust(size, b"\0"))
    expected[2 * MIB + 512 : 2 * MIB + 1536] = b"A" * 1024
    raw = tmp_path / "after"
    tool("qemu-img", "convert", "-f", form, "-O", "raw", image, raw)
    assert raw.read_bytes() == expected
    (tmp_path / "raw").write_bytes(CONTENT.ljust(size, b"\0"))
    assert state(run, tmp_path / "raw") == expected
    # What a recording of a guest's view is held against is the guest's view, too.
    nbdproxy("audit", run, image)


def test_a_format_that_qemu_cannot_write_says_so(tmp_path: Path) -> None:
    """QEMU's reason for a compressed VMDK; ours for what it never writes."""
    image, _ = make(tmp_path, "vmdk, a stream")
    overlay = ("--format", "vmdk", "--overlay")
    with Proxy(tmp_path / "proxy", image, *overlay) as proxy, proxy.client() as client:
        assert client.read(0, SIZE) == CONTENT
    foreign = tmp_path / "x.dmg"
    foreign.write_bytes(bytes(4096) + b"koly" + bytes(508))
    assert "which QEMU can only read" in told("serve", foreign, "--format", "dmg", "--run", "true")


@pytest.mark.parametrize("kind", ["vmdk", "vdi", "vpc, fixed", "vhdx"])
def test_its_bytes_are_never_looked_at_for_files(tmp_path: Path, kind: str) -> None:
    image, form = make(tmp_path, kind)
    files = tmp_path / "files"
    files.write_text("0" * 64 + "  /a\n")
    for words in (("check", image, "--no-fsck"), ("check", image, "--files", files, "--no-fsck")):
        done = nbdproxy(*words, code=2)
        said = re.sub(r"\s+", " ", done.stdout + done.stderr)
        assert FORMATS[ImageFormat(form)].said in said
        assert f"qemu-img convert -f {form} -O raw" in said
    assert FORMATS[ImageFormat(form)].said in told("manifest", image)


def test_a_recording_of_such_bytes_is_unknown_and_not_lost(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "vmdk")
    files = tmp_path / "files"
    files.write_text("0" * 64 + "  /a\n")
    run = tmp_path / "run"
    with Proxy(tmp_path / "proxy", image, "--format", "raw", "--record", run) as proxy:
        with proxy.client() as client:
            client.flush()
        assert proxy.stop() == 0
    said = nbdproxy("replay", run, "--files", files, "--at", "end", code=2)
    assert "VMDK" in said.stdout + said.stderr


def test_an_encrypted_disk_is_raw_if_the_guest_opens_it(tmp_path: Path) -> None:
    image, key = tmp_path / "image", tmp_path / "key"
    image.write_bytes(bytes(4 << 20))
    key.write_text("secret")
    quickly = ("--pbkdf-force-iterations", "1000")
    tool("cryptsetup", "-q", "luksFormat", "--type", "luks1", *quickly, image, key)
    assert "add --format raw if it is the guest that opens it" in told(
        "serve", image, "--run", "true"
    )
    assert "its key is needed" in told("serve", image, "--format", "luks", "--run", "true")
    with Proxy(tmp_path / "proxy", image, "--format", "raw") as proxy, proxy.client() as client:
        assert client.read(0, 4) == b"LUKS"


def test_another_format_than_the_files_is_refused(tmp_path: Path) -> None:
    image, _ = make(tmp_path, "vdi")
    said = told("serve", image, "--format", "vmdk", "--run", "true")
    assert "is not a VMDK image of VMware but a VDI image of VirtualBox" in said


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"KDMV".ljust(600, b"\0"), ImageFormat.VMDK),
        (b"COWD", ImageFormat.VMDK),
        (b"conectix".ljust(2000, b"\0"), ImageFormat.VPC),
        (bytes(88) + b"conectix".ljust(512, b"\0"), ImageFormat.VPC),
        (bytes(1024) + b"koly".ljust(512, b"\0"), ImageFormat.DMG),
        (b"Bochs Virtual HD Image\0" + bytes(600), ImageFormat.BOCHS),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", ImageFormat.CLOOP),
        (b"QFI\xfb\0\0\0\1", ImageFormat.QCOW),
        (b"QFI\xfb\0\0\0\7", ImageFormat.QCOW2),
        (b"LUKS\xba\xbe\0\2", ImageFormat.LUKS),
        (b"QED", None),
        (b"conectix"[:7].rjust(512, b"\0"), None),
        (b"", None),
        (bytes(4096), None),
    ],
)
def test_magics_at_both_ends(content: bytes, found: ImageFormat | None) -> None:
    assert format_of(lambda at, count: content[at : at + count], len(content)) is found

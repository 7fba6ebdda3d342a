"""`RecordedSource.base`: the disk as it was at the start, from before-images, holes and the image.

The recording is made by a real `PreservingDisk`; the law runs it over random images with holes.
Not covered: crash states on top of it; see test_state.py and tests/laws.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.disks.file import FileDisk
from nbdproxy.disks.overlay import OverlayDisk
from nbdproxy.errors import ImageError
from nbdproxy.recording.meta import Ending, Fingerprint, Meta
from nbdproxy.recording.writer import RecordingWriter
from nbdproxy.server.below.copy_before_write import PreservingDisk
from tests.support.images import write_sparse

S = 512
DATA = b"".join(bytes([n]) * 4096 for n in (1, 0, 2, 3, 0, 4)) + b"\x05" * S
"""Four blocks of data with holes between, and half a granule at the end."""


class Run:
    """An image and a recording of what is done to it; `end` ends both in order."""

    def __init__(self, folder: Path, content: bytes = DATA, *, overlay: bool = False) -> None:
        self.image = write_sparse(folder / "image", content)
        below = FileDisk(self.image, read_only=overlay)
        data = tuple((one.offset, one.length) for one in below.data_extents(0, below.size))
        base = Fingerprint.of(self.image)
        meta = Meta(below.size, str(self.image), overlay, data, base, (), "now", "test")
        self.path = folder / "run"
        self.recorder = RecordingWriter(self.path, meta)
        self.disk = OverlayDisk(below) if overlay else PreservingDisk(below, self.recorder)

    def end(self) -> RecordedSource:
        """End in order, and read."""
        self.disk.close()
        self.recorder.close(Ending("done", Fingerprint.of(self.image)))
        return RecordedSource(self.path)


def content_of(source: RecordedSource) -> bytes:
    """The whole base."""
    disk = source.base()
    try:
        return disk.pread(0, disk.size)
    finally:
        disk.close()


def image_of(blocks: list[int], odd: int) -> bytes:
    """Blocks of 4 KiB, holes (0) or data, and some odd sectors; no two sectors of data alike."""
    kinds = [block for block in blocks for _ in range(4096 // S)] + [7] * odd
    return b"".join(bytes([kind, n if kind else 0]) * (S // 2) for n, kind in enumerate(kinds))


changes = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "punch", "trim", "save"]),
        st.integers(0, 120),
        st.integers(1, 24),
    ),
    max_size=12,
)


@given(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=14), st.integers(0, 7), changes)
@settings(max_examples=150, deadline=None)
def test_the_base_is_the_image_as_it_was(
    blocks: list[int], odd: int, chosen: list[tuple[str, int, int]]
) -> None:
    content = image_of(blocks, odd)
    sectors = len(content) // S
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), content)
        assert isinstance(run.disk, PreservingDisk)
        for number, (what, first, count) in enumerate(chosen):
            offset = first % sectors * S
            length = min(count, sectors - first % sectors) * S
            if what == "write":
                run.disk.pwrite(offset, bytes([100 + number]) * length)
            elif what == "save":
                run.disk.save_all([(offset, length)])
            elif what == "trim":
                run.disk.trim(offset, length)
            else:
                run.disk.zero(offset, length, may_punch=what == "punch")
        source = run.end()
        assert content_of(source) == content
        base = source.base()
        sectorwise = b"".join(base.pread(at, S) for at in range(0, base.size, S))
        assert sectorwise == content
        shown = bytearray(len(content))
        for extent in base.data_extents(0, base.size):
            shown[extent.offset : extent.end] = content[extent.offset : extent.end]
            assert base.pread(extent.offset, extent.length) == content[extent.offset : extent.end]
        assert shown == content
        base.close()
        source.close()


def test_each_granule_is_saved_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(3):
        run.disk.pwrite(S, b"x" * S)
        run.disk.pwrite(8192, b"y" * 8192)
    source = run.end()
    saved = source.befores
    assert (saved.offset.tolist(), saved.length.tolist()) == ([0, 8192], [4096, 8192])
    assert (saved.position >= 0).all()


def test_holes_need_no_before_image(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.disk.pwrite(4096, b"x" * 4096)
    source = run.end()
    assert len(source.befores) == 0
    assert content_of(source) == DATA


def test_an_image_that_is_wholly_saved_is_not_needed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.disk.trim(0, len(DATA))
    source = run.end()
    run.image.unlink()
    assert not source.needs_image
    assert content_of(source) == DATA


def test_an_image_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    source = Run(tmp_path).end()
    source.image.rename(tmp_path / "elsewhere")
    assert source.needs_image
    with pytest.raises(ImageError, match="is not there any more; name it with --base"):
        source.base()


def test_an_image_that_went_on_is_refused(tmp_path: Path) -> None:
    source = Run(tmp_path).end()
    status = source.image.stat()
    os.utime(source.image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ImageError, match="was changed after the recording ended"):
        source.base()


def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    source = Run(tmp_path).end()
    writer = FileDisk(source.image)
    with pytest.raises(ImageError, match="in use"):
        source.base()
    writer.close()
    assert content_of(source) == DATA


def test_under_an_overlay_the_image_must_be_as_at_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path, overlay=True)
    run.disk.pwrite(0, b"x" * 8192)
    source = run.end()
    assert content_of(source) == DATA
    status = source.image.stat()
    os.utime(source.image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ImageError, match="was changed after"):
        source.base()


def test_another_image_may_be_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.disk.pwrite(0, b"x" * 4096)
    run.end().close()
    run.image.unlink()
    copy = write_sparse(tmp_path / "copy", DATA)
    source = RecordedSource(run.path, image=copy)
    assert source.image == copy
    assert content_of(source) == DATA
    with pytest.raises(ImageError, match="there is no image at"):
        RecordedSource(run.path, image=tmp_path / "nothing").base()
    other = write_sparse(tmp_path / "other", DATA + bytes(S))
    with pytest.raises(ImageError, match=f"has {len(DATA) + S} bytes"):
        RecordedSource(run.path, image=other).base()


def test_a_killed_recorders_image_is_trusted_if_its_size_is_right(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.disk.pwrite(0, b"x" * 4096)
    run.disk.close()
    source = RecordedSource(run.path)
    assert content_of(source) == DATA
    os.truncate(run.image, len(DATA) + S)
    with pytest.raises(ImageError, match="was changed after"):
        source.base()
    source.close()
    run.recorder.close(Ending("done", None))


def test_a_recording_whose_end_is_lost_does_not_trust_the_image(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.disk.pwrite(0, b"x" * 4096)
    run.end().close()
    os.truncate(run.path / "events", 64)
    source = RecordedSource(run.path)
    with pytest.raises(ImageError, match=r"the end of .* is lost"):
        source.base()
    source.close()
    copy = write_sparse(tmp_path / "copy", DATA)
    assert content_of(RecordedSource(run.path, image=copy)) == DATA


def test_of_two_savings_of_a_place_the_first_counts(tmp_path: Path) -> None:
    """Two clients save a cold place at once; the second one reads what the first has written."""
    run = Run(tmp_path)
    run.recorder.before(0, b"\x01" * 4096)
    run.recorder.before(0, b"\x77" * 4096)
    run.recorder.before(2048, b"\x77" * 4096)
    content = content_of(run.end())
    assert content[:4096] == DATA[:4096]
    assert content[4096:6144] == b"\x77" * 2048


def test_an_image_that_went_on_after_its_recorder_was_killed_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    shutil.copytree(run.path, tmp_path / "killed")
    run.end()
    for file in (tmp_path / "killed").iterdir():  # into the same files: a copy asks for its image
        shutil.copyfile(file, run.path / file.name)
    source = RecordedSource(run.path)
    assert content_of(source) == DATA
    later = time.time() + 3600
    os.utime(run.image, (later, later))
    with pytest.raises(ImageError, match="changed after the recording ended"):
        source.base()

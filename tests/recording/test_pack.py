"""`pack` and `unpack`: what comes out is what went in, or there is one sentence and no folder.

Not covered: archives made in bad faith, in test_unpack.py; the commands, and real recordings and
images, in tests/cli/test_pack.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from shutil import copytree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdproxy.errors import ImageError, RecordingError
from nbdproxy.extents import Extent
from nbdproxy.recording.meta import Meta
from nbdproxy.recording.pack import Packed, PackedBase, pack
from nbdproxy.recording.reader import Recording
from nbdproxy.recording.unpack import unpack
from nbdproxy.recording.writer import RecordingWriter
from tests.recording.example import ENDING, META, SIZE, fill, make
from tests.support.packs import contents, names, seal_frame, unseal
from tests.support.serving import tool

TIB = 1 << 40


class Disk:
    """A disk of bytes, zero behind them."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        return self.content[offset : offset + length].ljust(length, b"\0")


CONTENT = bytes(n * 7 % 251 + 1 for n in range(4096)) + bytes(4096) + b"\x09" * 512
BASE = PackedBase(Disk(CONTENT), (Extent(512, 3584), Extent(8192, 512)))


def pack_run(
    run: Path, target: Path, base: PackedBase | None = BASE, extras: dict[str, Path] | None = None
) -> Packed:
    """Pack a folder."""
    with closing(Recording(run)) as recording:
        return pack(recording, target, base=base, extras=extras)


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording with one of everything. Nobody may change it."""
    path = tmp_path_factory.mktemp("pack") / "run1"
    make(path)
    return path


@pytest.fixture(scope="module")
def packed(run: Path) -> bytes:
    """It packed, with a base."""
    path = run.parent / "run1.nbdpack"
    pack_run(run, path)
    return path.read_bytes()


def refused(content: bytes) -> str:
    """Unpacking this must be an error of one sentence, and leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "file")
        source.write_bytes(content)
        with pytest.raises(RecordingError) as caught:
            unpack(source, Path(folder, "out"))
        assert names(Path(folder)) == ["file"]
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(str(source))


def test_what_was_packed_comes_out(run: Path, packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(packed)
    done = unpack(tmp_path / "file", tmp_path / "out")
    found = files_of(tmp_path / "out")
    assert json.loads(found.pop("pack.json"))["name"] == done.index.name == "run1"
    expected = bytearray(SIZE)
    for extent in BASE.extents:
        expected[extent.offset : extent.end] = CONTENT[extent.offset : extent.end]
    assert found.pop("base") == expected
    assert found == files_of(run)


def test_without_a_base_there_is_none(run: Path, tmp_path: Path) -> None:
    done = pack_run(run, tmp_path / "file", base=None)
    unpack(tmp_path / "file", tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == {"pack.json", "events", "data"}
    assert done.size == (tmp_path / "file").stat().st_size


def test_packing_again_gives_the_same_bytes(run: Path, packed: bytes, tmp_path: Path) -> None:
    copied = copytree(run, tmp_path / "a" / "run1")
    for path in copied.iterdir():
        path.chmod(0o644)
        os.utime(path, (1, 1))
    pack_run(copied, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == packed
    unpack(tmp_path / "again", tmp_path / "run1")
    own = PackedBase(Disk((tmp_path / "run1" / "base").read_bytes()), BASE.extents)
    pack_run(tmp_path / "run1", tmp_path / "third", base=own)
    assert (tmp_path / "third").read_bytes() == packed


def test_other_programs_read_it(packed: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(packed)
    tool("zstd", "--test", file)
    listed = tool("tar", "--zstd", "--list", "--verbose", "--numeric-owner", "--file", file)
    assert [line.split()[-1] for line in listed.splitlines()] == [
        *("pack.json", "events", "data", "base")
    ]
    assert all(line.startswith("-rw------- 0/0 ") for line in listed.splitlines())
    assert "1970-01-01" in listed
    tool("tar", "--zstd", "--extract", "--file", file, "--directory", tmp_path)
    assert (tmp_path / "events").read_bytes() == contents(unseal(packed))["events"]


def test_a_manifest_and_verdicts_are_found_again(run: Path, tmp_path: Path) -> None:
    (tmp_path / "files").write_bytes(b"a manifest\n")
    (tmp_path / "db").write_bytes(b"verdicts")
    added = {"files.sha256": tmp_path / "files", "explore.db": tmp_path / "db"}
    pack_run(run, tmp_path / "one", extras=added)
    unpack(tmp_path / "one", tmp_path / "run1")
    assert (tmp_path / "run1" / "files.sha256").read_bytes() == b"a manifest\n"
    assert (tmp_path / "run1" / "explore.db").read_bytes() == b"verdicts"
    # From the unpacked folder they are taken unasked.
    pack_run(tmp_path / "run1", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def test_a_killed_recorders_tails_are_packed(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "run", META)
    fill(writer)
    copytree(tmp_path / "run", tmp_path / "killed")
    writer.close(ENDING)
    done = pack_run(tmp_path / "killed", tmp_path / "file")
    assert done.size < 100_000
    unpack(tmp_path / "file", tmp_path / "out")
    found = files_of(tmp_path / "out")
    del found["pack.json"], found["base"]
    assert found == files_of(tmp_path / "killed")
    assert {"events.tail", "data.tail"} < set(found)
    with closing(Recording(tmp_path / "out")) as out, closing(Recording(tmp_path / "run")) as whole:
        assert list(out.log()) == list(whole.log())[:-1]
    # The 18 MiB of tails are mostly zeroes.
    assert (tmp_path / "out" / "data.tail").stat().st_blocks * 512 <= 2 * 1024 * 1024


def test_a_disk_of_a_tebibyte_takes_no_room(tmp_path: Path) -> None:
    parts = (Extent(0, 4096), Extent(TIB // 2 + 512, 3 << 20), Extent(TIB - 65536, 65536))

    class Huge:
        """Random at odd places, zero elsewhere; counts what is read."""

        def __init__(self) -> None:
            self.read = 0

        def pread(self, offset: int, length: int) -> bytes:
            """Return `length` bytes from `offset`."""
            assert any(one.offset <= offset and offset + length <= one.end for one in parts)
            self.read += length
            sectors = range(offset // 512, (offset + length) // 512)
            return b"".join(
                (b"%511d\n" % n) if n % 4096 == 5 or n == TIB // 512 - 1 else bytes(512)
                for n in sectors
            )

    fields = {name: getattr(META, name) for name in Meta.__slots__} | {"size": TIB}
    writer = RecordingWriter(tmp_path / "run", Meta(**fields))
    writer.close(ENDING)
    disk = Huge()
    done = pack_run(tmp_path / "run", tmp_path / "file", PackedBase(disk, parts))
    assert done.size < 20_000
    assert disk.read == 2 * sum(one.length for one in parts)
    unpack(tmp_path / "file", tmp_path / "out")
    out = tmp_path / "out" / "base"
    assert out.stat().st_size == TIB
    assert out.stat().st_blocks * 512 < 1 << 20
    with out.open("rb") as file:
        for part in parts:
            file.seek(part.offset)
            assert file.read(part.length) == disk.pread(*part)


def test_cut_off_anywhere_it_is_refused(packed: bytes) -> None:
    lengths = {*range(0, len(packed), max(len(packed) // 200, 1)), *range(30)}
    lengths |= {len(packed) - n for n in range(1, 60)}
    for length in sorted(lengths):
        told = refused(packed[:length])
        assert "is not a packed recording" in told if length < 4 else "was cut off" in told


def test_with_any_byte_changed_it_is_refused(packed: bytes) -> None:
    for at in {*range(0, len(packed), max(len(packed) // 200, 1)), *range(-40, 0)}:
        damaged = bytearray(packed)
        damaged[at] ^= 0x10
        assert "damaged" in refused(bytes(damaged)) or -len(packed) <= at < 4
    for more in (b"\0", packed, packed[-24:]):
        assert "damaged" in refused(packed + more)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_under_a_right_seal_is_refused_or_harmless(
    packed: bytes, data: st.DataObject
) -> None:
    """Bits that decide nothing exist in zstd; then what comes out is what went in."""
    frame = bytearray(packed[:-24])
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.none() | st.integers(0, len(frame) - 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "file").write_bytes(seal_frame(bytes(frame[:cut])))
        try:
            unpack(folder / "file", folder / "out")
        except RecordingError:
            assert names(folder) == ["file"]
        else:
            found = files_of(folder / "out")
            del found["base"]
            assert found == {k: v for k, v in contents(unseal(packed)).items() if k != "base"}


def grow(stream: Path) -> None:
    """Add to a stream."""
    with stream.open("ab") as file:
        file.write(b"more")


def overwrite(stream: Path) -> None:
    """Change a stream in its place."""
    with stream.open("r+b") as file:
        file.write(b"\xff")


@pytest.mark.parametrize("change", [grow, overwrite])
def test_a_recording_that_changes_is_not_packed(
    run: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    copied = copytree(run, tmp_path / "in" / "run1")
    told: list[str] = []

    def tell(what: str, done: int, total: int) -> None:
        """Strike between the first reading of `data`, and the second one."""
        if what == "packing" and what not in told:
            change(copied / "data")
        told.append(what)

    with (
        closing(Recording(copied)) as recording,
        pytest.raises(RecordingError, match="data was changed while it was packed; end what"),
    ):
        pack(recording, tmp_path / "file", base=BASE, progress=tell)
    assert told[0] == "reading"
    assert names(tmp_path) == ["in"]


def test_a_recording_that_grew_before_it_was_read_is_not_packed(tmp_path: Path) -> None:
    """What is saved after it was opened is not looked for in it, and is changed in the image."""
    writer = RecordingWriter(tmp_path / "run", META)
    fill(writer)
    with closing(Recording(tmp_path / "run")) as recording:
        writer.before(8192, b"old" + bytes(509))
        with pytest.raises(RecordingError, match="run is still being recorded; end what"):
            pack(recording, tmp_path / "file", base=BASE)
    writer.close(ENDING)
    assert names(tmp_path) == ["run"]


def test_an_image_that_changes_is_not_packed(run: Path, tmp_path: Path) -> None:
    class Changing(Disk):
        reads = 0

        def pread(self, offset: int, length: int) -> bytes:
            self.reads += 1
            return super().pread(offset, length) if self.reads < 3 else b"\x01" * length

    with pytest.raises(RecordingError, match="base was changed while it was packed"):
        pack_run(run, tmp_path / "file", PackedBase(Changing(CONTENT), BASE.extents))
    assert not names(tmp_path)


def test_an_image_that_cannot_be_read_is_named(run: Path, tmp_path: Path) -> None:
    class Broken(Disk):
        def pread(self, offset: int, length: int) -> bytes:  # noqa: ARG002 - whatever is read
            raise OSError(5, "Input/output error")

    with pytest.raises(ImageError, match=r"at byte 512 \(Input/output error\); name a copy"):
        pack_run(run, tmp_path / "file", PackedBase(Broken(b""), BASE.extents))
    assert not names(tmp_path)


def test_what_was_not_confirmed_gets_no_name(run: Path, tmp_path: Path) -> None:
    def confirm() -> None:
        raise ImageError("the image was changed")

    with closing(Recording(run)) as recording, pytest.raises(ImageError, match="was changed"):
        pack(recording, tmp_path / "file", base=BASE, confirm=confirm)
    assert not names(tmp_path)


def test_nothing_is_overwritten(run: Path, packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(packed)
    with pytest.raises(RecordingError, match="exists; name a new file"):
        pack_run(run, tmp_path / "file")
    (tmp_path / "out").mkdir()
    with pytest.raises(RecordingError, match="exists; name a new folder with -o"):
        unpack(tmp_path / "file", tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecordingError, match="exists"):
        unpack(tmp_path / "file", tmp_path / "link")
    assert names(tmp_path) == ["file", "link", "out"]


def test_what_cannot_be_read_or_written_is_told(run: Path, packed: bytes, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot be written: No such file"):
        pack_run(run, tmp_path / "no" / "file")
    with pytest.raises(RecordingError, match="cannot be read: No such file"):
        unpack(tmp_path / "nothing")
    with pytest.raises(RecordingError, match="is a folder: recordings are used as they are"):
        unpack(tmp_path)
    (tmp_path / "file").write_bytes(packed)
    with pytest.raises(RecordingError, match="out cannot be written: No such file"):
        unpack(tmp_path / "file", tmp_path / "no" / "out")
    with pytest.raises(RecordingError, match=r"nothing cannot be read \(No such file"):
        pack_run(run, tmp_path / "new", extras={"files.sha256": tmp_path / "nothing"})
    assert names(tmp_path) == ["file"]


def test_the_folder_has_the_recordings_name(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "renamed.nbdpack").write_bytes(packed)
    monkeypatch.chdir(tmp_path)
    assert unpack(Path("renamed.nbdpack")).folder == Path("run1")
    assert (tmp_path / "run1").stat().st_mode & 0o777 == 0o700

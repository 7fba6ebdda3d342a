"""Files out of an image into a folder: as they are there, and never anywhere else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.errors import FilesystemError, UsageError
from nbdproxy.oracles.browse import BrowsedEntry
from nbdproxy.oracles.ext4.faults import CorruptError, UnsupportedError
from nbdproxy.oracles.extract import DEPTH_MAX, Extracted, extract
from nbdproxy.oracles.mounts import Mount, Tree, tree_of
from nbdproxy.oracles.quick import QUICK, QuickOracle
from tests.support.serving import tool

TIME_NS = 1_234_567_890 * 10**9
FRACTION_NS = 987_654_321
BIG = 9 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An ext4 with one of everything."""
    folder = tmp_path_factory.mktemp("made")
    tree = folder / "tree"
    (tree / "app" / "sub").mkdir(parents=True)
    (tree / "app" / "plain").write_bytes(b"plain\n" * 1000)
    (tree / "app" / "plain").chmod(0o4751)
    (tree / "app" / "secret").write_bytes(b"secret")
    (tree / "app" / "secret").chmod(0)
    (tree / "app" / "empty").touch()
    with (tree / "app" / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"x" * 5000)
    (tree / "app" / "up").symlink_to("../../../../../../etc/passwd")
    (tree / "app" / "long").symlink_to("/" + "far/" * 40 + "away")
    os.link(tree / "app" / "plain", tree / "app" / "sub" / "second")
    (tree / "app" / "caf\udce9").write_bytes(b"latin")
    (tree / "slash").mkdir()
    (tree / "slash" / "..Xout").write_bytes(b"hostile")
    (tree / "slash" / "good").write_bytes(b"good")
    for path in tree.rglob("*"):
        os.utime(path, ns=(TIME_NS, TIME_NS), follow_symlinks=False)
    (tree / "app" / "sub").chmod(0o500)
    made = folder / "image"
    with made.open("wb") as out:
        out.truncate(16 << 20)
    features = "^metadata_csum,^dir_index,inline_data"
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-I", "256", "-O", features, "-d", tree, made)
    script = folder / "script"
    script.write_text(
        f"cd app\nmknod fifo p\nmknod null c 1 3\nmknod disk b 8 0\n"
        f"set_inode_field sparse size {BIG}\n"  # mke2fs leaves out a hole at the end
        f"set_inode_field secret mtime_extra {FRACTION_NS << 2}\n"
    )
    tool("debugfs", "-w", "-f", script, made)
    return made.read_bytes().replace(b"..Xout", b"../out")


def taken(image: bytes, folder: Path, *paths: str, tree: Tree | None = None) -> Extracted:
    folder.mkdir()
    return extract(QUICK, MemoryDisk(image), tree or Tree(), paths or ["/"], folder)


def test_everything_is_as_it_is_there(image: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = taken(image, out)
    app = out / "app"
    assert (
        (app / "plain").read_bytes() == (app / "sub" / "second").read_bytes() == b"plain\n" * 1000
    )
    assert (app / "caf\udce9").read_bytes() == b"latin"
    assert (app / "empty").read_bytes() == b""
    sparse = app / "sparse"
    assert sparse.read_bytes() == bytes(3 << 20) + b"x" * 5000 + bytes(BIG - (3 << 20) - 5000)
    assert sparse.stat().st_blocks * 512 < 1 << 20
    assert (app / "up").readlink() == Path("../../../../../../etc/passwd")
    assert (app / "long").readlink() == Path("/" + "far/" * 40 + "away")
    for path in (app, app / "plain", app / "up", app / "sub", app / "sub" / "second"):
        assert path.lstat().st_mtime_ns == TIME_NS, path
    assert (app / "secret").stat().st_mtime_ns == TIME_NS + FRACTION_NS
    modes = {"plain": 0o751, "secret": 0o400, "empty": 0o644, "sub": 0o700}
    assert {name: stat.S_IMODE((app / name).lstat().st_mode) for name in modes} == modes
    assert dict(found.skipped) == {
        "/app/fifo": "it is a FIFO",
        "/app/null": "it is a device node",
        "/app/disk": "it is a device node",
    }
    assert not (app / "fifo").exists()
    assert found.doubtful == []


def test_a_name_that_leads_out_is_lost_and_writes_nothing(image: bytes, tmp_path: Path) -> None:
    found = taken(image, tmp_path / "out", "/slash")
    assert found.lost == [("/slash", "there is a name '../out', which cannot be")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["slash"]
    assert (tmp_path / "out" / "slash" / "good").read_bytes() == b"good"


def test_what_is_asked_for_is_taken_and_nothing_else(image: bytes, tmp_path: Path) -> None:
    paths = ("app/sub/../plain", "/app/sub/second", "/app/sub", "/app/up", "/gone", "/app/plain/x")
    found = taken(image, tmp_path / "out", *paths)
    app = tmp_path / "out" / "app"
    assert sorted(one.path for one in found.written) == sorted(
        [b"/app/plain", b"/app/sub", b"/app/sub/second", b"/app/up"]
    )
    assert sorted(path.name for path in app.iterdir()) == ["plain", "sub", "up"]
    assert found.lost == [("/gone", "it is not there"), ("/app/plain/x", "it is not there")]


def test_a_broken_file_is_lost_and_no_part_of_it_is_left(image: bytes, tmp_path: Path) -> None:
    """Its extent tree has a bad magic number, which a kernel answers with an error."""
    with QUICK.browse(MemoryDisk(image), mount=Mount()) as view:
        node = view.find(b"/app/sparse")
    assert node is not None
    at = image.index(node.node.raw[:0x60])
    broken = image[: at + 0x28] + b"\0\0" + image[at + 0x2A :]
    found = taken(broken, tmp_path / "out", "/app")
    [(path, why)] = found.lost
    assert path == "/app/sparse"
    assert "extent tree" in why
    assert not (tmp_path / "out" / "app" / "sparse").exists()
    assert (tmp_path / "out" / "app" / "plain").exists()


def test_several_filesystems_are_one_tree(image: bytes, tmp_path: Path) -> None:
    """What one covers of the other is not seen; what cannot be read is said."""
    disk = image + image
    table = "label: dos\nstart=2048,size=32768\nstart=34816,size=32768\n"
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20) + disk + bytes(1 << 20))
    tool("sh", "-c", f"printf '{table}' | /sbin/sfdisk -q {path}")
    mounts = [Mount("/", 1), Mount("/slash", 2, "/app")]
    tree = tree_of(mounts, {"/home": "partition 3 is LUKS2"})
    found = taken(path.read_bytes(), tmp_path / "out", tree=tree)
    assert (tmp_path / "out" / "slash" / "empty").exists()
    assert (tmp_path / "out" / "app" / "empty").exists()
    assert not (tmp_path / "out" / "slash" / "good").exists()
    assert ("/home", "partition 3 is LUKS2") in found.doubtful
    found = taken(path.read_bytes(), tmp_path / "two", "/home/u", "/slash/empty", tree=tree)
    assert found.doubtful == [("/home/u", "partition 3 is LUKS2")]
    assert [one.path for one in found.written] == [b"/slash/empty"]


def test_what_has_no_filesystem_is_not_told(tmp_path: Path) -> None:
    found = taken(b"\1" * (1 << 20), tmp_path / "out")
    [(path, why)] = found.doubtful
    assert path == "/"
    assert "no filesystem" in why


FOLDER, FILE, LINK = 0o40755, 0o100644, 0o120777


class Hostile:
    """A view in which a folder has what no sound filesystem has."""

    def __init__(self, outside: Path, *names: tuple[bytes, int]) -> None:
        self._outside = bytes(outside)
        self._names = names

    def find(self, path: bytes) -> BrowsedEntry:
        return BrowsedEntry(path, FOLDER, 0, 0, None, (1,))

    def below(self, folder: BrowsedEntry) -> Iterator[BrowsedEntry | tuple[bytes, FilesystemError]]:
        for number, (name, mode) in enumerate(self._names, start=2):
            size = 1 << 62 if name == b"huge" else 1
            key = (1,) if name == b"loop" else (number, len(folder.path))
            yield BrowsedEntry(folder.path.rstrip(b"/") + b"/" + name, mode, size, 0, None, key)
        yield folder.path.rstrip(b"/") + b"/odd", UnsupportedError("nobody knows")
        yield folder.path, CorruptError("a part is broken")

    def target(self, link: BrowsedEntry) -> bytes:
        return self._outside if b"twice" in link.path else b""

    def pieces(self, _: BrowsedEntry) -> Iterator[tuple[int, bytes]]:
        yield 0, b"x"


class HostileOracle(QuickOracle):
    """Shows it."""

    def __init__(self, view: Hostile) -> None:
        self.view = view

    @contextmanager
    def browse(  # type: ignore[override]
        self,
        device: ReadableDevice,  # noqa: ARG002
        *,
        mount: Mount,  # noqa: ARG002
    ) -> Iterator[Hostile]:
        yield self.view


def test_no_link_is_followed_and_no_name_is_trusted(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    view = Hostile(
        outside,
        *((b"twice", FOLDER), (b"twice", LINK), (b"x" * 300, FILE), (b"huge", FILE)),
        *((b"also twice", LINK), (b"also twice", FOLDER), (b"also twice", FILE)),
        *((b"..", FOLDER), (b".", FILE), (b"", FILE), (b"a/b", FILE), (b"nul\0", FILE)),
        *((b"nowhere", LINK), (b"kept", FILE), (b"loop", FOLDER)),
    )
    out = tmp_path / "out"
    out.mkdir()
    found = extract(HostileOracle(view), MemoryDisk(b""), Tree(), ["/"], out)
    names = {path.relative_to(out).parts[0] for path in out.rglob("*")}
    assert names <= {"twice", "also twice", "kept", "loop"}
    assert (out / "also twice").is_symlink()
    assert (out / "kept").read_bytes() == b"x"
    assert list(outside.iterdir()) == []
    assert ("/odd", "nobody knows") in found.doubtful
    assert ("/", "a part is broken") in found.lost
    assert ("/loop", "it is a folder within itself") in found.doubtful
    assert max(len(path.relative_to(out).parts) for path in out.rglob("*")) <= DEPTH_MAX + 1


def test_a_folder_that_cannot_be_written_is_an_error(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nbdproxy.oracles.extract.write_blocks", full)
    with pytest.raises(UsageError, match="No space left on device; what is there is not all"):
        taken(image, tmp_path / "out")


def test_a_disk_of_zeroes_has_lost_what_its_partitions_had(tmp_path: Path) -> None:
    tree = Tree((Mount(partition=2),))
    found = extract(QUICK, MemoryDisk(bytes(1 << 20)), tree, ["/etc"], tmp_path)
    assert found.lost == [("/", "the disk reads all zeroes")] and not found.doubtful

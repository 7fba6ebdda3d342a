"""`unpack` and archives made in bad faith: one sentence, nothing left, nothing outside the folder.

Each archive here has a right seal and, unless that is the point, a right index.
"""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from zstandard import ZstdCompressionParameters, ZstdCompressor

from nbdproxy.errors import RecordingError
from nbdproxy.recording.unpack import unpack
from tests.recording.example import SIZE, make
from tests.support.packs import contents, entry, index_of, names, seal, seal_frame

END = bytes(1024)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a right recording."""
    path = tmp_path_factory.mktemp("run") / "run"
    make(path)
    return {name: (path / name).read_bytes() for name in ("events", "data")}


def facts(members: dict[str, bytes]) -> dict[str, int]:
    """What a right index says of it."""
    return {"size": SIZE, "events": len(members["events"]) // 64}


def right(members: dict[str, bytes], /, **other: object) -> bytes:
    """A right archive of these members, without its end; `other` goes to the index."""
    index = index_of(members, **(facts(members) | other))
    return entry("pack.json", index) + b"".join(entry(*one) for one in members.items())


def refused(content: bytes, folder: Path, saying: str) -> None:
    """Unpacking this must fail, saying so, and leave nothing behind."""
    inner = folder / "inner"
    inner.mkdir()
    (inner / "file").write_bytes(content)
    before = names(folder)
    with pytest.raises(RecordingError, match=saying) as caught:
        unpack(inner / "file", inner / "out")
    assert "\n" not in str(caught.value)
    assert names(inner) == ["file"]
    assert names(folder) == before


def test_what_is_built_here_is_right_but_for_its_fault(
    members: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(seal(right(members) + END))
    unpack(tmp_path / "file", tmp_path / "out")
    assert (tmp_path / "out" / "data").read_bytes() == members["data"]


NAMES = [
    "/etc/events",
    "../events",
    "out/../../events",
    "./events",
    "events/",
    "Events",
    "",
    "pack.json",
    "data",
    ".bashrc",
    "events\x1b[2J",
    "\udcff",
    "a" * 100,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_member_of_another_name(members: dict[str, bytes], tmp_path: Path, name: str) -> None:
    archive = entry("pack.json", index_of(members, **facts(members)))
    member = entry(name, members["events"])
    refused(seal(archive + member + entry("data", members["data"]) + END), tmp_path, "has ")


@pytest.mark.parametrize("name", NAMES)
def test_a_member_of_another_name_that_the_index_lists(
    members: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    listed = {**members, name: b"x"} if name not in members else {name: b"", **members}
    text = index_of(listed, **facts(members))
    archive = entry("pack.json", text) + b"".join(entry(*one) for one in members.items())
    refused(seal(archive + entry(name, b"x") + END), tmp_path, "has ")


KINDS = [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
    tarfile.CONTTYPE,
    tarfile.GNUTYPE_SPARSE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link", ["", "/etc/passwd", "data"])
def test_what_is_no_file(members: dict[str, bytes], tmp_path: Path, kind: bytes, link: str) -> None:
    archive = entry("pack.json", index_of(members, **facts(members)))
    member = entry("events", members["events"], type=kind, linkname=link)
    archive += member + entry("data", members["data"]) + END
    refused(seal(archive), tmp_path, "has (a|no) ")


def test_an_extended_header_of_a_right_member(members: dict[str, bytes], tmp_path: Path) -> None:
    """It could hold another name and size, and as much as it likes."""
    archive = entry("pack.json", index_of(members, **facts(members)))
    extended = entry("./PaxHeaders/events", b"18 path=/etc/evil\n", type=tarfile.XHDTYPE)
    refused(seal(archive + extended + right(members)[1024:] + END), tmp_path, "where events should")


@pytest.mark.parametrize("by", [-1, 1, 512, 2**40, -(10**6)])
@pytest.mark.parametrize("liar", ["index", "header"])
def test_a_size_that_lies(members: dict[str, bytes], tmp_path: Path, by: int, liar: str) -> None:
    index = json.loads(index_of(members, **facts(members)))
    size = len(members["data"])
    if liar == "index":
        index["members"][1]["size"] += by
    head = tarfile.TarInfo("data")
    head.size = size + (by if liar == "header" else 0)
    data = head.tobuf(tarfile.GNU_FORMAT) + members["data"] + bytes(-size % 512)
    archive = entry("pack.json", json.dumps(index).encode()) + entry("events", members["events"])
    refused(seal(archive + data + END), tmp_path, "has .*(and its index says|cannot be understood)")


@pytest.mark.parametrize("size", [-1, -(2**40), 65537, 2**50])
def test_an_index_whose_size_lies(tmp_path: Path, size: int) -> None:
    head = tarfile.TarInfo("pack.json")
    head.size = size
    refused(seal(head.tobuf(tarfile.GNU_FORMAT) + END * 100), tmp_path, "has an index of")


def test_a_member_that_its_index_does_not_know(members: dict[str, bytes], tmp_path: Path) -> None:
    other = members | {"data": members["data"][:-1] + b"?"}
    archive = right(members)[: -len(entry("data", members["data"]))] + entry("data", other["data"])
    refused(seal(archive + END), tmp_path, "a data that its index does not know")


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        ({"version": 2}, "format version 2, and this nbdproxy reads 1"),
        ({"version": "\x1b\n"}, "cannot be understood"),
        ({"version": []}, "cannot be understood"),
        ({"size": SIZE + 512}, "an index of another recording"),
        ({"events": 1}, "an index of another recording"),
        ({"size": -1}, "cannot be understood"),
        ({"size": 2**64}, "cannot be understood"),
        ({"size": True}, "cannot be understood"),
        ({"events": 1.5}, "cannot be understood"),
        ({"name": 7}, "cannot be understood"),
        ({"more": 7}, "cannot be understood"),
        ({"members": {}}, "cannot be understood"),
        ({"members": [1]}, "cannot be understood"),
        ({"members": [{"name": "events"}]}, "cannot be understood"),
    ],
)
def test_an_index_that_is_wrong(
    members: dict[str, bytes], tmp_path: Path, change: dict[str, object], saying: str
) -> None:
    refused(seal(right(members, **change) + END), tmp_path, saying)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"7", b"{}", b"{" * 60000, b"\xff", b"[" * 60000]
)
def test_an_index_that_is_none(tmp_path: Path, text: bytes) -> None:
    refused(seal(entry("pack.json", text) + END), tmp_path, "cannot be understood")


def test_members_that_cannot_be(members: dict[str, bytes], tmp_path: Path) -> None:
    only = {"events": members["events"]}
    swapped = {"data": members["data"], "events": members["events"]}
    for number, wrong in enumerate((only, swapped)):
        (tmp_path / str(number)).mkdir()
        refused(
            seal(right(wrong | {}, **facts(members)) + END), tmp_path / str(number), "understood"
        )


def test_a_tail_that_no_memory_holds(members: dict[str, bytes], tmp_path: Path) -> None:
    index = json.loads(index_of({**members, "data.tail": b""}, **facts(members)))
    index["members"][2]["size"] = 1 << 40
    archive = entry("pack.json", json.dumps(index).encode())
    refused(seal(archive + right(members)[1024:] + END), tmp_path, "cannot be understood")


def chunk(offset: int, length: int, data: bytes | None = None) -> bytes:
    """A chunk of a base."""
    return struct.pack("<QQ", offset, length) + (b"x" * length if data is None else data)


@pytest.mark.parametrize(
    "content",
    [
        chunk(0, 0, b""),
        chunk(SIZE, 1),
        chunk(SIZE - 1, 2),
        chunk(2**63, 512),
        chunk(2**64 - 1, 2**64 - 1, b""),
        chunk(0, 512) + chunk(511, 512),
        chunk(512, 512) + chunk(0, 512),
        chunk(0, 512)[:-1],
        chunk(0, 512) + b"x",
        chunk(0, 512) + struct.pack("<QQ", 1024, 1),
    ],
)
def test_a_base_that_cannot_be(members: dict[str, bytes], tmp_path: Path, content: bytes) -> None:
    refused(seal(right(members | {"base": content}) + END), tmp_path, "has a base")


@pytest.mark.parametrize(
    ("end", "saying"),
    [
        (b"", "ends too early"),
        (bytes(512), "ends too early"),
        (entry("data", b"x") + END, "more members"),
        (bytes(512) + b"\1" + bytes(511), "more members"),
        (END + b"\0", "goes on"),
        (END + entry("x", b"x"), "goes on"),
    ],
)
def test_an_end_that_is_none(
    members: dict[str, bytes], tmp_path: Path, end: bytes, saying: str
) -> None:
    refused(seal(right(members) + end), tmp_path, saying)


def test_something_between_members(members: dict[str, bytes], tmp_path: Path) -> None:
    assert len(members["data"]) % 512
    refused(seal(right(members)[:-1] + b"?" + END), tmp_path, "something between")


@pytest.mark.parametrize("frame", [b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd" + b"\xff" * 100])
def test_a_frame_that_is_none(tmp_path: Path, frame: bytes) -> None:
    refused(seal_frame(frame), tmp_path, "not a packed recording|cannot be decompressed|too early")


def test_a_second_frame(members: dict[str, bytes], tmp_path: Path) -> None:
    compress = ZstdCompressor(write_checksum=True).compress
    refused(seal_frame(compress(right(members) + END) + compress(b"x")), tmp_path, "goes on")


def test_a_window_that_takes_much_memory(members: dict[str, bytes], tmp_path: Path) -> None:
    wide = ZstdCompressionParameters.from_level(3, window_log=28)
    out = io.BytesIO()
    with ZstdCompressor(compression_params=wide).stream_writer(out, closefd=False) as writer:
        writer.write(right(members) + END)
    refused(seal_frame(out.getvalue()), tmp_path, "cannot be decompressed")


@pytest.mark.parametrize("name", ["", ".", "..", "/etc", "a/b", "a\0", "a\n", "\x1b[2J", "\udcff"])
def test_a_folder_of_a_bad_name(
    members: dict[str, bytes], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(seal(right(members, name=name) + END))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordingError, match="which is no good name; name one with -o DIR") as told:
        unpack(tmp_path / "file")
    assert str(told.value).isprintable()
    assert names(tmp_path) == ["file"]
    unpack(tmp_path / "file", tmp_path / "out")


BOMB = """
import sys, resource
from pathlib import Path
from nbdproxy.errors import RecordingError
from nbdproxy.recording.unpack import unpack
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
except RecordingError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


def test_a_bomb_takes_no_room(members: dict[str, bytes], tmp_path: Path) -> None:
    """A GiB behind an end, and as a header: neither memory nor disk is taken."""
    for number, (before, size) in enumerate(((right(members) + END, 0), (b"", 1 << 30))):
        out = io.BytesIO()
        with ZstdCompressor(write_checksum=True).stream_writer(out, closefd=False) as writer:
            writer.write(before)
            if not before:
                writer.write(entry("pack.json", b"", type=tarfile.XHDTYPE, size=size))
            for _ in range(1024):
                writer.write(bytes(1 << 20))
        source = tmp_path / str(number)
        source.write_bytes(seal_frame(out.getvalue()))
        assert source.stat().st_size < 1 << 20
        done = subprocess.run(
            [sys.executable, "-c", BOMB, source, tmp_path / "out"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        )
        error, grown_kib = done.stdout.splitlines()
        assert ("goes on behind its end" if before else "not a regular file") in error
        assert int(grown_kib) < 64 * 1024
        assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(members: dict[str, bytes], tmp_path: Path) -> None:
    large = members | {"base": chunk(0, SIZE)}
    (tmp_path / "file").write_bytes(seal(right(large) + END))
    done = subprocess.run(
        [sys.executable, "-c", BOMB, tmp_path / "file", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2)),
    )
    assert "out cannot be written: File too large" in done.stdout
    assert names(tmp_path) == ["file"]


def test_contents_are_read_as_tar_reads_them(members: dict[str, bytes]) -> None:
    assert list(contents(right(members) + END)) == ["pack.json", "events", "data"]

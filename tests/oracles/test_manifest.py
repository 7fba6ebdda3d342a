"""Manifests: what sha256sum writes, what it reads, and where in a filesystem the files are."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.errors import ManifestError
from nbdproxy.oracles.condition import Condition, classify
from nbdproxy.oracles.manifest import (
    DIGITS,
    Entries,
    Entry,
    Manifest,
    digest,
    dump,
    from_directory,
    link_entry,
    load,
    parse,
)
from nbdproxy.oracles.resolutions import resolve

A, B = "a" * 64, "b" * 64
NAMES = ["plain", "two  spaces", "new\nline", "back\\slash", "carriage\rreturn", "é", "x\udcff"]
NAMES += ["\\n", " leading", "# comment", "trailing "]


def of(*paths: str) -> Manifest:
    return Manifest(tuple(Entry(path, A, None) for path in paths))


def paths(manifest: Manifest) -> list[str]:
    return [entry.path for entry in manifest.entries]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in NAMES:
        (root / "sub" / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    (root / "empty").touch()
    (root / "link").symlink_to("empty")
    return root


def test_sha256sum_accepts_what_dump_writes(folder: Path) -> None:
    text = dump(from_directory(folder)).encode("utf-8", "surrogateescape")
    done = subprocess.run(
        ["sha256sum", "--check", "--strict"],
        input=text,
        cwd=folder,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b": OK\n") == len(NAMES) + 1
    (folder / "empty").write_bytes(b"no longer")
    again = subprocess.run(
        ["sha256sum", "--check"], input=text, cwd=folder, capture_output=True, check=False
    )
    assert again.returncode == 1


def test_parse_reads_what_sha256sum_writes(folder: Path, tmp_path: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [f"./{path.relative_to(folder)}" for path in files]
    for option in ("--text", "--binary"):
        done = subprocess.run(
            ["sha256sum", option, "--", *names], cwd=folder, capture_output=True, check=True
        )
        manifest = tmp_path / "manifest"
        manifest.write_bytes(done.stdout)
        listed = from_directory(folder).entries
        expected = {(e.path, e.digest) for e in listed if e.target is None}
        assert {(e.path, e.digest) for e in load(manifest).entries} == expected


@pytest.mark.parametrize("options", [(), ("--tag",), ("--zero",), ("--tag", "--zero")])
@pytest.mark.parametrize(
    ("tool", "algorithm"),
    [
        *((f"{name}sum", name) for name in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512")),
        ("b2sum", "blake2b"),
    ],
)
def test_parse_reads_what_every_such_program_writes(
    folder: Path, tmp_path: Path, tool: str, algorithm: str, options: tuple[str, ...]
) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [f"./{path.relative_to(folder)}" for path in files]
    done = subprocess.run(
        [tool, *options, "--", *names], cwd=folder, capture_output=True, check=True
    )
    manifest = tmp_path / "manifest"
    manifest.write_bytes(done.stdout)
    expected = {
        Entry(str(path.relative_to(folder)), digest([path.read_bytes()], algorithm), None)
        for path in files
    }
    found = load(manifest)
    assert {replace(e, algorithm="sha256") for e in found.entries} == expected
    is_named = "--tag" in options
    ones = ("sha512", "blake2b") if DIGITS[algorithm] == 128 and not is_named else (algorithm,)
    assert {e.algorithms for e in found.entries} == {ones}
    for entry, path in ((e, folder / e.path) for e in found.entries):
        content = path.read_bytes()
        assert classify(entry, len(content), [content]) is Condition.WHOLE
        assert classify(entry, 1, [b"?"]) is Condition.DAMAGED
        assert entry.is_of(content) and not entry.is_of(b"?")
    again = subprocess.run(
        [tool, "--check", "--strict"],
        input=dump(found).encode("utf-8", "surrogateescape"),
        cwd=folder,
        capture_output=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr


def test_openssl_and_bsd_write_it_their_way() -> None:
    text = f"SHA256(a b)= {A}\nSHA2-256(c)= {A}\nSHA256 (d (1)) = {A}\n"
    assert paths(parse(text, "test")) == ["a b", "c", "d (1)"]


def test_dpkgs_lists_begin_at_the_root(tmp_path: Path) -> None:
    for name in ("bash.md5sums", "md5sums"):
        file = tmp_path / name
        file.write_text(f"{'c' * 32}  bin/bash\n{'d' * 32}  usr/share/a b\n")
        assert load(file).entries == (
            Entry("/bin/bash", "c" * 32, None, algorithm="md5"),
            Entry("/usr/share/a b", "d" * 32, None, algorithm="md5"),
        )


RPM = f"""\
/etc 4096 1690000000 {"0" * 64} 040755 root root 0 0 0 X
/etc/a b.conf 12 1690000000 {A} 0100644 root root 1 0 0 X
/usr/bin/su 40 1690000000 {"c" * 32} 0104755 root root 0 0 0 X
/usr/lib/l.so 13 1690000000 {"0" * 64} 0120777 root root 0 0 0 to there.so
/var/log/ghost 0 1690000000 {"0" * 64} 0100600 root root 0 0 0 X
/dev/null 0 1690000000  020666 root root 0 0 259 X
"""


def test_rpms_dump_has_files_and_links() -> None:
    assert parse(RPM, "test").entries == (
        Entry("/etc/a b.conf", A, 12, 0o644),
        Entry("/usr/bin/su", "c" * 32, 40, 0o4755, algorithm="md5"),
        link_entry("/usr/lib/l.so", "to there.so"),
    )


def test_sizes_and_names_survive(folder: Path, tmp_path: Path) -> None:
    manifest = from_directory(folder, under="/app/")
    file = tmp_path / "manifest"
    file.write_bytes(dump(manifest).encode("utf-8", "surrogateescape"))
    assert load(file) == manifest
    assert {e.path: e.size for e in manifest.entries}["/app/empty"] == 0
    assert {e.path: e.target for e in manifest.entries}["/app/link"] == "empty"


NAME = (
    st.binary(min_size=1)
    .filter(lambda name: b"\0" not in name)
    .map(lambda name: name.decode("utf-8", "surrogateescape"))
    .filter(lambda name: not re.search(r"/\.?/", "/" + name))
)
MODES = st.none() | st.integers(0, 0o7777)


@given(st.dictionaries(NAME, NAME | MODES, min_size=1))
def test_dump_and_parse_are_inverse(told: dict[str, str | int | None]) -> None:
    """Files with and without a size and a mode, and links; any bytes in names and targets."""
    manifest = Manifest(
        tuple(
            link_entry("/" + name, what)
            if isinstance(what, str)
            else Entry("/" + name, A, len(name) % 3 or None, what)
            for name, what in told.items()
        )
    )
    text = dump(manifest)
    assert parse(text, "test") == manifest
    text.encode("utf-8", "surrogateescape")


def test_modes_and_links_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "program").write_bytes(b"#!")
    (root / "program").chmod(0o754)
    (root / "to-folder").symlink_to("folder")
    (root / "to-nothing").symlink_to(os.fsdecode(b"\xff"))
    found = {e.path: e for e in from_directory(root, modes=True).entries}
    assert found["program"].mode == 0o754
    assert found["to-folder"] == link_entry("to-folder", "folder")
    assert found["to-nothing"].target == "\udcff"
    assert len(found) == 3
    assert "# mode 754\n" in dump(Manifest((found["program"],)))
    assert dump(Manifest((found["to-folder"],))) == '# symlink ["to-folder", "folder"]\n'


def test_a_comment_belongs_to_the_next_line_only() -> None:
    text = f"# size 5\n{A}  a\n{A}  b\n# size 7\n\n{A}  c\n# sizes are fun\n{B} *d\n"
    assert [e.size for e in parse(text, "test").entries] == [5, None, None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m: the manifest is empty"),
        ("# size 4\n", "m: the manifest is empty"),
        (f"{A}  a\nnonsense\n", "m:2: not a line"),
        (f"{A[:-1]}  a\n", "m:1: a digest of 63 hex digits is none"),
        (f"{A}  \n", "m:1: not a line"),
        (f"SHA256 (a) = {A[:-1]}\n", "m:1: a digest of 63 hex digits is none"),
        (f"BLAKE2b-256 (a) = {A}\n", "m:1: a digest of 64 hex digits is none"),
        ("S.5....T.  c /etc/passwd\n", "m:1: `rpm -V` tells what differs"),
        ("missing     /etc/passwd\n", "m:1: `rpm -V` tells what differs"),
        (f"\0{A}  a\0", "m:1: not a line"),
        (f"\\{A}  a\\b\n", "m:1: the name has an escape"),
        (f"{A}  a\n{B}  ./a\n", "m:2: 'a' already stands above"),
        ('# symlink ["a"]\n', "m:1: a symbolic link is written as"),
        ('# symlink [1, "x"]\n', "m:1: a symbolic link is written as"),
        (f"# symlink {'[' * 100_000}]\n", "m:1: a symbolic link is written as"),
        (f"# mode 644\n{A}  a\n# mode 755\n{A}  a\n", "m:4: 'a' already stands above"),
        ("# symlink [}]\n", "m:1: a symbolic link is written as"),
        (f'{A}  a\n# symlink ["a", "b"]\n', "m:2: 'a' already stands above"),
    ],
)
def test_bad_manifests_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        parse(text, "m")


def test_lines_of_other_systems_and_repetitions_are_taken() -> None:
    assert paths(parse(f"{A.upper()}  a\r\n{A}  a\r\n", "test")) == ["a"]


def test_slashes_and_dots_that_say_nothing_are_left_out() -> None:
    text = "".join(f"{A}  {name}\n" for name in ("//etc//a", "/etc/./b/.c", "././d/.//e", ".f/..g"))
    assert paths(parse(text, "m")) == ["/etc/a", "/etc/b/.c", "d/e", ".f/..g"]


def test_a_byte_order_mark_says_nothing(tmp_path: Path) -> None:
    """Windows writes one, of UTF-8, and ends lines with CR LF."""
    file = tmp_path / "files"
    for text in (f"{A}  /a\r\n{B}  /b\r\n", f"# size 7\n{A}  /a\n{B}  /b\n", f"{A}  /a\0{B}  /b\0"):
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load(file) == parse(text, "test")
        assert paths(load(file)) == ["/a", "/b"]


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="not a directory"):
        from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("named", "there", "found"),
    [
        # absolute already, even if another place matches as well
        (["/app/a.js", "/app/b.js"], ["/app/a.js", "/old/app/a.js"], ["/app/a.js", "/app/b.js"]),
        # a directory in front; the majority decides
        (["m/a", "m/b"], ["/app/m/a", "/app/m/b", "/x/m/a"], ["/app/m/a", "/app/m/b"]),
        # named in a guest that mounts the filesystem at /data
        (["/data/m/a", "/data/b"], ["/m/a", "/b", "/c"], ["/m/a", "/b"]),
        # moved from one directory to another
        (["/srv/x/a", "/srv/x/b"], ["/app/x/a", "/app/x/b"], ["/app/x/a", "/app/x/b"]),
        # relative to the root
        (["a", "b"], ["/a"], ["/a", "/b"]),
        # half of the files are gone, and frequent names lie about
        (
            ["m/p/i.js", "m/q/i.js"],
            ["/z/i.js", "/app/m/q/i.js"],
            ["/app/m/p/i.js", "/app/m/q/i.js"],
        ),
    ],
)
def test_resolve_finds_the_place(named: list[str], there: list[str], found: list[str]) -> None:
    assert paths(resolve(of(*named), there)) == found


def test_resolve_refuses_what_it_cannot_know() -> None:
    with pytest.raises(ManifestError, match="matches nothing on this filesystem"):
        resolve(of("m/a"), ["/b", "/m/c"])
    with pytest.raises(ManifestError, match="equally well under /x, /y"):
        resolve(of("m/a"), ["/x/m/a", "/y/m/a"])


def test_resolve_copes_with_thousands_of_equal_names() -> None:
    named = [f"m/p{i}/package.json" for i in range(3000)]
    assert paths(resolve(of(*named), ["/app/" + name for name in named]))[7] == "/app/" + named[7]


def test_a_place_is_found_where_only_the_most_common_name_is_there() -> None:
    """A guest that was cut off early has the one package.json that it wrote first."""
    packages = [f"/app/node_modules/p{i:03}/package.json" for i in range(200)]
    manifest = Manifest(tuple(Entry(p, "0" * 64, None) for p in [*packages, "/app/package.json"]))
    assert resolve(manifest, {"/app/package.json"}) == manifest


ODD = (
    Entry("/a/b", A, 1),
    Entry("/a/c", B, 10**19 - 1, 0o755),
    Entry("b", "c" * 32, None, algorithm="md5", is_guessed=True),
    Entry("/", "d" * 128, 0, algorithm="blake2b"),
    Entry("/x\udcff/\ud800", A, None),
    link_entry("/a/link", "é\udcff"),
    Entry("", "", None),
)


def test_entries_in_columns_are_what_they_were() -> None:
    columns = Entries(ODD)
    assert columns == ODD and hash(columns) == hash(ODD)
    assert repr(columns) == repr(ODD)  # databases of verdicts know a manifest by it
    assert pickle.loads(pickle.dumps(columns)) == columns != Entries(ODD[1:])
    assert (columns[-1], columns[1:3]) == (ODD[-1], list(ODD[1:3]))
    assert [one.is_guessed for one in columns] == [one.is_guessed for one in ODD]
    assert list(Manifest(columns).paths()) == list(Manifest(ODD).paths())
    assert list(columns.paths()) == [one.path for one in ODD]


def test_a_line_takes_a_hundred_bytes(tmp_path: Path) -> None:
    count = 20_000
    path = tmp_path / "manifest"
    with path.open("w") as file:
        for number in range(count):
            folder = f"/app/node_modules/package-{number // 20}/node_modules/inner/dist/internal"
            file.write(f"{number:064x}  {folder}/module-{number % 20}.js\n")
    load(path)
    tracemalloc.start()
    manifest = load(path)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest.entries) == count
    assert kept < 100 * count and most < 160 * count


def test_a_line_that_stands_twice_counts_before_a_wrong_one_below_it() -> None:
    with pytest.raises(ManifestError, match="m:2: '/a' already stands above"):
        parse(f"{A}  /a\n{B}  /a\nnonsense\n", "m")
    with pytest.raises(ManifestError, match="m:2: not a line"):
        parse(f"{A}  /a\nnonsense\n{B}  /a\n", "m")
    again = parse(f"{A}  /a\n{B}  /b\n{A}  /a\n", "m")
    assert [one.path for one in again.entries] == ["/a", "/b"]

r"""Manifests: the files that should be there, with digest and, where known, size.

The format is that of GNU `sha256sum`, so `sha256sum -c` reads what `dump` writes and `parse` reads
what `sha256sum` writes: 64 hex digits, a space, a space or `*`, the name; a line that starts with
a backslash has `\n`, `\r` and `\\` escaped in its name. The rest travels in comments, which
`sha256sum -c` skips: lines `# size 1234` and `# mode 755` belong to the entry in the next line, and
a symbolic link is a line `# symlink ["PATH", "TARGET"]` in JSON. Names that are not UTF-8 are
carried as surrogate escapes.

Other digests, and other programs' lists, are read as well, line by line: md5, sha1, sha224,
sha384 and sha512, told by how many digits they have; lines that name it, `SHA256 (NAME) = DIGEST`
(`--tag`, BSD, openssl), BLAKE2b of 512 bits among them; lines that end with NUL, whose names have
no escapes (`-z`); `rpm --dump`, of which regular files and links are taken, with size and mode; and
dpkg's lists of md5, whose names begin at the root, if the file is called `*md5sums`.

Of 128 digits without a name either is meant, as `sha512sum` and `b2sum` write the same: a file that
has one of the two digests is whole. Not covered: other programs that write as many digits as one of
SHA's (`b3sum`): no file is whole by such a list, of which `condition.doubt_of` makes a sentence.

Names may be absolute in the filesystem or stand below some directory of it: see `resolutions`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from nbdproxy.errors import ManifestError
from nbdproxy.oracles.globs import Matcher, no_file

SHA256 = "sha256"
BY_DIGITS = {32: "md5", 40: "sha1", 56: "sha224", 64: SHA256, 96: "sha384", 128: "sha512"}
"""The algorithms, as hashlib calls them, by the hexadecimal digits that a line has."""
TAGS = {
    **{"SHA2-" + name[3:]: name for name in BY_DIGITS.values() if name.startswith("sha")},
    **{name.upper(): name for name in BY_DIGITS.values()},
    "BLAKE2b": "blake2b",
}
"""The names that lines give the algorithms; the last one of each is how `dump` writes it."""
ALIKE = {"sha512": ("blake2b",)}
"""What else a line may mean that has as many digits as an algorithm's, and does not name it."""
DIGITS = {name: digits for digits, name in BY_DIGITS.items()} | {"blake2b": 128}
WEAK = frozenset({"md5", "sha1"})
"""They tell a lost file as well as any, and prove nothing of one that somebody forged."""
LINE = re.compile(r"(\\?)([0-9a-fA-F]+) [ *](.+)", re.DOTALL)
TAGGED = re.compile(r"(\\?)([A-Za-z0-9-]+) ?\((.+)\) ?= ([0-9a-fA-F]+)", re.DOTALL)
RPM = re.compile(
    r"(?P<path>/.*) (?P<size>\d{1,19}) \d+ (?P<digest>[0-9a-f]*) (?P<mode>0[0-7]{1,7}) \S+ \S+ "
    r"[01] [01] \S+ (?P<target>.+)"
)
VERIFIED = re.compile(r"(?:[.?SM5DLUGTPC]{8,9}|missing) +(?:[cdglr] )?/.*")
"""A line of `rpm -V`, which tells what differs, and not what should be there."""
SIZE = re.compile(r"# size (\d{1,19})")
MODE = re.compile(r"# mode ([0-7]{1,4})")
LINK = re.compile(r"# symlink (\[.*\])")
REPEATED = re.compile(r"/(?:\./|/)+")
"""What stands in a path where a single slash says the same."""
PERMISSIONS = 0o7777
ESCAPES = {"\\": "\\", "n": "\n", "r": "\r"}
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its path, the digest of its content in hex, its size in bytes if known.

    `mode` has its permission bits, if they matter. A `target` makes it a symbolic link that leads
    there; then digest and size are those of the target. `algorithm` is the digest's, as hashlib
    calls it; `is_guessed` if nothing but the number of digits tells it.
    """

    path: str
    digest: str
    size: int | None
    mode: int | None = None
    target: str | None = None
    algorithm: str = SHA256
    is_guessed: bool = field(default=False, compare=False)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Those that the digest may be of."""
        return (self.algorithm, *(ALIKE.get(self.algorithm, ()) if self.is_guessed else ()))

    def is_of(self, content: bytes) -> bool:
        """Tell whether a content has the digest."""
        return any(digest([content], name) == self.digest for name in self.algorithms)


def link_entry(path: str, target: str) -> Entry:
    """Return the entry of a symbolic link."""
    raw = target.encode("utf-8", "surrogateescape")
    return Entry(path, digest([raw]), len(raw), target=target)


class _Kind(NamedTuple):
    """What many entries have alike; `width` is how many bytes the digest has."""

    width: int
    is_sizeless: bool
    mode: int | None
    target: str | None
    algorithm: str
    is_guessed: bool


class Entries(Sequence[Entry]):
    """Entries in columns, about 85 bytes for one of npm's; each is made when it is asked for.

    Of a path the directory is kept once for all that are in it; digests are kept as bytes. A thing
    that few entries have, or many have alike, is in `_kinds`: all but name, digest and size.
    """

    __slots__ = ("_blob", "_ends", "_folder", "_folders", "_kind", "_kinds", "_sizes")

    def __init__(self, entries: Iterable[Entry]) -> None:
        """Take entries one after the other; none is kept as it is."""
        folders: dict[str, int] = {}
        kinds: dict[_Kind, int] = {}
        self._blob, self._ends, self._sizes = bytearray(), array("Q"), array("Q")
        self._folder, self._kind = array("I"), array("I")
        for entry in entries:
            start = entry.path.rfind("/") + 1
            folder, name = entry.path[:start], entry.path[start:]
            raw = bytes.fromhex(entry.digest)
            kind = _Kind(
                width=len(raw),
                is_sizeless=entry.size is None,
                mode=entry.mode,
                target=entry.target,
                algorithm=entry.algorithm,
                is_guessed=entry.is_guessed,
            )
            self._folder.append(folders.setdefault(folder, len(folders)))
            self._kind.append(kinds.setdefault(kind, len(kinds)))
            self._sizes.append(entry.size or 0)
            self._blob += raw
            self._blob += name.encode("utf-8", "surrogatepass")
            self._ends.append(len(self._blob))
        self._folders, self._kinds = tuple(folders), tuple(kinds)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Entry]: ...
    def __getitem__(self, at: int | slice) -> Entry | Sequence[Entry]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        kind = self._kinds[self._kind[at]]
        raw = self._blob[self._ends[at - 1] if at else 0 : self._ends[at]]
        name = raw[kind.width :].decode("utf-8", "surrogatepass")
        return Entry(
            self._folders[self._folder[at]] + name,
            raw[: kind.width].hex(),
            None if kind.is_sizeless else self._sizes[at],
            mode=kind.mode,
            target=kind.target,
            algorithm=kind.algorithm,
            is_guessed=kind.is_guessed,
        )

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def paths(self) -> Iterator[str]:
        """Yield the paths, sooner than with all else."""
        start = 0
        for folder, kind, end in zip(self._folder, self._kind, self._ends, strict=True):
            name = self._blob[start + self._kinds[kind].width : end]
            yield self._folders[folder] + name.decode("utf-8", "surrogatepass")
            start = end

    def repeated(self) -> list[int]:
        """Return where a path stands that may stand in another place as well, in order."""
        starts = chain([0], self._ends)
        widths = [kind.width for kind in self._kinds]
        keys = np.fromiter(
            (
                hash((folder, bytes(self._blob[start + widths[kind] : end])))
                for folder, kind, start, end in zip(
                    self._folder, self._kind, starts, self._ends, strict=False
                )
            ),
            np.int64,
            len(self),
        )
        ordered = np.sort(keys)
        return np.flatnonzero(np.isin(keys, ordered[1:][ordered[1:] == ordered[:-1]])).tolist()


@dataclass(frozen=True, slots=True)
class Manifest:
    """Files in the order given; no path stands twice."""

    entries: Sequence[Entry]

    def paths(self) -> Iterator[str]:
        """Yield the paths of the files, in order."""
        if isinstance(self.entries, Entries):
            return self.entries.paths()
        return (entry.path for entry in self.entries)


def load(path: Path) -> Manifest:
    """Read a manifest file; raises ManifestError if it cannot be read as one."""
    try:
        with path.open("rb") as file:
            if file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ManifestError(
                    f"{path} is UTF-16, as PowerShell's > writes it; save it as UTF-8"
                )
            raw = any(b"\0" in part for part in iter(partial(file.read, CHUNK), b""))
            file.seek(0)
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            # Line by line: the text of a million files takes more memory than what it says.
            lines = file.read().removesuffix(b"\0").split(b"\0") if raw else file
            decoded = (line.decode("utf-8", "surrogateescape").removesuffix("\n") for line in lines)
            return _parse(decoded, str(path), raw=raw, from_root=is_dpkg(path))
    except OSError as error:
        raise ManifestError(
            f"{path}: {error.strerror}; write a manifest with `nbdproxy manifest` or `sha256sum`"
        ) from error


def is_dpkg(path: Path) -> bool:
    """Tell whether a file is called as dpkg's lists are: its names begin at the root."""
    return path.name.endswith("md5sums")


def parse(text: str, source: str, *, from_root: bool = False) -> Manifest:
    """Read a manifest; `source` names it in error messages.

    With `from_root` its names begin at the filesystem's root, whether they say so or not.

    Raises ManifestError, with the line's number, for a line that is none, for a name with two
    digests, and for a manifest without entries.
    """
    raw = "\0" in text
    lines = text.removesuffix("\0").split("\0") if raw else text.split("\n")
    return _parse(lines, source, raw=raw, from_root=from_root)


def _parse(lines: Iterable[str], source: str, *, raw: bool, from_root: bool) -> Manifest:
    """Read a manifest's lines; `raw` ones end with NUL, and have no escapes."""
    numbers = array("Q")
    wrong: list[ManifestError] = []

    def read() -> Iterator[Entry]:
        try:
            for number, entry in _entries(lines, source, raw=raw, from_root=from_root):
                numbers.append(number)
                yield entry
        except ManifestError as error:
            wrong.append(error)

    entries = Entries(read())
    known: dict[str, Entry] = {}
    again = set()
    for at in entries.repeated():
        entry = entries[at]
        if known.setdefault(entry.path, entry) != entry:
            raise ManifestError(
                f"{source}:{numbers[at]}: {entry.path!r} already stands above with another digest, "
                f"size, mode or target; keep the line of the version you expect"
            )
        if known[entry.path] is not entry:
            again.add(at)
    if wrong:
        raise wrong[0]
    if not entries:
        raise ManifestError(
            f"{source}: the manifest is empty; write one with `nbdproxy manifest` or `sha256sum`"
        )
    if again:
        entries = Entries(entry for at, entry in enumerate(entries) if at not in again)
    return Manifest(entries)


def _entries(
    lines: Iterable[str], source: str, *, raw: bool, from_root: bool
) -> Iterator[tuple[int, Entry]]:
    """Yield what lines say, and their numbers."""
    comments = _NO_COMMENTS
    for number, line in enumerate(lines, start=1):
        entry = None
        if line.startswith("#"):
            comments = _with_comment(line.rstrip(), comments)
            entry = _link(line.rstrip(), f"{source}:{number}")
        else:
            if raw or line.strip():
                entry = _entry(line, comments, (source, number), raw=raw)
            comments = _NO_COMMENTS
        if entry is not None:
            if from_root:
                entry = replace(entry, path="/" + entry.path.lstrip("/"), is_guessed=False)
            yield number, entry


def dump(manifest: Manifest) -> str:
    """Return the manifest as text; encode it as UTF-8 with `surrogateescape`."""
    lines = []
    for entry in manifest.entries:
        if entry.target is not None:
            lines.append(f"# symlink {json.dumps([entry.path, entry.target])}")
            continue
        if entry.size is not None:
            lines.append(f"# size {entry.size}")
        if entry.mode is not None:
            lines.append(f"# mode {entry.mode:o}")
        name = entry.path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        mark = "" if name == entry.path else "\\"
        if entry.algorithm == SHA256 or len(entry.algorithms) > 1:
            lines.append(f"{mark}{entry.digest}  {name}")
        else:
            lines.append(f"{mark}{_TAG_OF[entry.algorithm]} ({name}) = {entry.digest}")
    return "".join(line + "\n" for line in lines)


def from_directory(
    root: Path, under: str | None = None, *, modes: bool = False, without: Matcher = no_file
) -> Manifest:
    """Describe every regular file and symbolic link below `root`, named by its path from there.

    `under` names a directory to put in front of each path (where `root` stands in the guest).
    With `modes` the files have theirs. What has a name that `without` means is not read, and no
    folder of such a name is entered. Raises ManifestError for what cannot be read.
    """
    if not root.is_dir():
        raise ManifestError(f"{root}: not a directory; name the one whose files are expected")
    front = "" if under is None else under.rstrip("/") + "/"

    def named(path: Path) -> str:
        return front + path.relative_to(root).as_posix()

    entries = Entries(
        _describe(path, named(path), modes=modes)
        for path in _files(root, lambda path: without(named(path)))
    )
    if not entries:
        raise ManifestError(
            f"{root}: there are no files in it, or --exclude leaves out all; name the "
            "directory that has them"
        )
    return Manifest(entries)


def digest(chunks: Iterable[bytes], algorithm: str = SHA256) -> str:
    """Return the digest of a stream, in hex."""
    result = hashlib.new(algorithm, usedforsecurity=False)
    for chunk in chunks:
        result.update(chunk)
    return result.hexdigest()


_TAG_OF = {name: tag for tag, name in TAGS.items()}
_BY_TAG = {tag.upper(): name for tag, name in TAGS.items()}


class _Comments(NamedTuple):
    """What comments have said of the entry in the next line."""

    size: int | None = None
    mode: int | None = None


_NO_COMMENTS = _Comments()


def _with_comment(comment: str, before: _Comments) -> _Comments:
    """Return what is known of the next entry with one more comment."""
    if size := SIZE.fullmatch(comment):
        return before._replace(size=int(size[1]))
    if mode := MODE.fullmatch(comment):
        return before._replace(mode=int(mode[1], 8))
    return before


def _link(comment: str, where: str) -> Entry | None:
    """Return the symbolic link that a comment tells of, if it does."""
    found = LINK.fullmatch(comment)
    if found is None:
        return None
    try:
        path, target = json.loads(found[1])
        if not isinstance(path, str) or not isinstance(target, str):
            raise TypeError
        return link_entry(REPEATED.sub("/", path), target)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ManifestError(
            f'{where}: a symbolic link is written as `# symlink ["PATH", "TARGET"]`; mend the line'
        ) from None


def _entry(line: str, comments: _Comments, at: tuple[str, int], *, raw: bool) -> Entry | None:
    """Return the entry of a line; None if it lists what is no file. `raw` names have no escapes."""
    source, number = at
    where = f"{source}:{number}"
    if not raw and not line.startswith("\\"):
        line = line.removesuffix("\r")
    if line.startswith("/") and (listed := RPM.fullmatch(line)):
        return _of_rpm(listed)
    plain = LINE.fullmatch(line)
    if plain:
        escaped, found, name = plain.groups()
        algorithm = BY_DIGITS.get(len(found))
    elif tagged := TAGGED.fullmatch(line):
        escaped, tag, name, found = tagged.groups()
        algorithm = _BY_TAG.get(tag.upper())
    else:
        raise _no_line(line, where)
    if algorithm is None or len(found) != DIGITS[algorithm]:
        raise ManifestError(
            f"{where}: a digest of {len(found)} hex digits is none that is read here "
            f"({', '.join(DIGITS)}); write the line with one of these"
        )
    if escaped and not raw:
        name = _unescape(name, where)
    name = REPEATED.sub("/", name)
    while name.startswith("./"):
        name = name[2:]
    # A size stands in the lines of our own manifests, whose algorithm is known.
    is_guessed = plain is not None and comments.size is None
    return Entry(
        path=name,
        digest=found.lower(),
        size=comments.size,
        mode=comments.mode,
        algorithm=algorithm,
        is_guessed=is_guessed,
    )


def _no_line(line: str, where: str) -> ManifestError:
    if VERIFIED.fullmatch(line):
        return ManifestError(
            f"{where}: `rpm -V` tells what differs, and not what should be there; list that with: "
            f"rpm -qa --dump"
        )
    return ManifestError(
        f"{where}: not a line of `sha256sum` output (hex digits, two spaces, a file name), nor of "
        f"`md5sum`, `--tag` or `rpm --dump`; mend or remove it"
    )


def _of_rpm(listed: re.Match[str]) -> Entry | None:
    """Return the entry of a line of `rpm --dump`; folders, devices and ghosts have none."""
    mode, found = int(listed["mode"], 8), listed["digest"]
    path = REPEATED.sub("/", listed["path"])
    if stat.S_ISLNK(mode):
        return link_entry(path, listed["target"])
    algorithm = BY_DIGITS.get(len(found))
    if not stat.S_ISREG(mode) or algorithm is None or not found.strip("0"):
        return None
    size, permissions = int(listed["size"]), mode & PERMISSIONS
    return Entry(path, found, size, permissions, algorithm=algorithm)


def _unescape(name: str, where: str) -> str:
    pieces = re.split(r"\\(.?)", name, flags=re.DOTALL)
    for i in range(1, len(pieces), 2):
        if pieces[i] not in ESCAPES:
            raise ManifestError(
                f"{where}: the name has an escape that is none of \\\\, \\n and \\r; "
                f"write the line with `sha256sum`"
            )
        pieces[i] = ESCAPES[pieces[i]]
    return "".join(pieces)


def _files(root: Path, is_left_out: Callable[[Path], bool]) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise ManifestError(f"{error.filename}: {error.strerror}; make it readable") from error

    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = sorted(name for name in folders if not is_left_out(Path(folder, name)))
        for name in sorted(files):
            path = Path(folder, name)
            if is_left_out(path):
                continue
            if path.is_symlink() or path.is_file():
                yield path
        # A link to a folder stands among the folders, which are not followed.
        yield from (Path(folder, name) for name in folders if Path(folder, name).is_symlink())


def _describe(path: Path, name: str, *, modes: bool) -> Entry:
    try:
        if path.is_symlink():
            return link_entry(name, os.readlink(path))  # noqa: PTH115 - keeps any bytes
        with path.open("rb") as file:
            found = digest(iter(lambda: file.read(CHUNK), b""))
            size = file.tell()
            mode = os.fstat(file.fileno()).st_mode & PERMISSIONS if modes else None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; make it readable") from error
    return Entry(name, found, size, mode)

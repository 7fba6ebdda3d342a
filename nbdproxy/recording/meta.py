"""What a recording says of itself: the first event (META) and the last (END), as JSON.

META tells what was recorded and how the disk can be rebuilt; END how the run ended, and what the
image was like then, so that a later change of it is noticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nbdproxy.errors import RecordingError
from nbdproxy.recording.format import VERSION

IMPORTED = ("imported",)
"""The `policies` of a recording that was made of another program's log."""
_SIZE_END = 1 << 63
"""Bytes of a disk are a signed number of 64 bits."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Tells whether a file is still what it was: bytes, and the last change in nanoseconds."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Fingerprint:
        """Take the fingerprint of a path or descriptor; OSError if it cannot be looked at."""
        status = os.stat(file)  # noqa: PTH116 - also of descriptors
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Meta:
    """How a recording began.

    size           the disk's, in bytes
    image          the image's absolute path; an NBD URI if `kind` is nbd
    overlay        the image was not written at all
    data           what was not a hole at the start, as [offset, length] pairs in bytes
    base           the image's fingerprint at the start
    policies       names of the policies in force
    started        the wall clock, ISO 8601 with its zone
    program        name and version of the recorder
    kind           raw: the image's bytes are the disk; nbd: the disk of another server; else the
                   format of the image (qcow2, vmdk), whose guest's view was recorded
    fua            whether clients were offered FUA; None in recordings that do not say
    origin         what tells the recording's files from a copy of them: see `origin_of`; None in
                   recordings that do not say
    """

    size: int
    image: str
    overlay: bool
    data: tuple[tuple[int, int], ...]
    base: Fingerprint
    policies: tuple[str, ...]
    started: str
    program: str
    kind: str = "raw"
    fua: bool | None = None
    origin: str | None = None

    @property
    def offers_fua(self) -> bool | None:
        """Whether a client could send FUA; None if that is not known."""
        if self.fua is not None or self.kind == "nbd" or self.policies == IMPORTED:
            return self.fua
        return True  # files were never served without

    def dump(self) -> str:
        """Return the JSON text of META."""
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def parse(cls, text: str) -> Meta:
        """Read META's JSON text; raises RecordingError if it is of another version, or no META."""
        fields = _load(text, "META")
        version = fields.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise RecordingError(
                f"this recording has format version {version}, and this nbdproxy reads {VERSION}; "
                "use the nbdproxy that made it"
            )
        try:
            fields["base"] = Fingerprint(**fields["base"])
            fields["data"] = tuple((start, length) for start, length in fields["data"])
            fields["policies"] = tuple(fields["policies"])
            return cls(**fields)._checked()
        except (KeyError, TypeError, ValueError) as error:
            raise _wrong("META", error) from None

    def _checked(self) -> Meta:
        """Return itself; raises ValueError if a value is of another kind, or cannot be."""
        texts = [self.image, self.started, self.program, self.kind, *self.policies]
        _check(texts, str)
        _check([text for text in (self.origin,) if text is not None], str)
        _check([self.overlay, *(one for one in (self.fua,) if one is not None)], bool)
        _check([self.size, self.base.size, self.base.mtime_ns], int)
        _check([number for part in self.data for number in part], int)
        if not 0 <= self.size < _SIZE_END:
            raise ValueError(f"a disk of {self.size} bytes")
        end = 0
        for start, length in self.data:
            if start < end or length < 0 or start + length > self.size:
                raise ValueError("data outside the disk, or not in its order")
            end = start + length
        if "\0" in self.image or not _is_path(self.image):
            raise ValueError("an image that no path can name")
        return self


@dataclass(frozen=True, slots=True)
class Ending:
    """How a recording ended: the reason in words, and the image's fingerprint then."""

    reason: str
    image: Fingerprint | None

    def dump(self) -> str:
        """Return the JSON text of END."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Ending:
        """Read END's JSON text; raises RecordingError if it is not one."""
        fields = _load(text, "END")
        try:
            reason, image = fields["reason"], fields["image"]
            _check([reason], str)
            found = None if image is None else Fingerprint(**image)
            _check([] if found is None else [found.size, found.mtime_ns], int)
            return cls(reason, found)
        except (KeyError, TypeError, ValueError) as error:
            raise _wrong("END", error) from None


def origin_of(events: os.stat_result) -> str:
    """Return what tells a recording's file `events` from a copy, here or on another machine.

    Whoever makes a recording elsewhere cannot know it: it is made of the file's number and of this
    machine's, which machine-id(5) asks not to tell to others; hence the digest.
    """
    try:
        machine = Path("/etc/machine-id").read_bytes()
    except OSError:
        machine = b""
    return sha256(b"nbdproxy %d %s" % (events.st_ino, machine)).hexdigest()[:32]


def _load(text: str, what: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(what, error) from None
    if not isinstance(fields, dict):
        raise _wrong(what, TypeError(f"a JSON {type(fields).__name__}"))
    return fields


def _check(values: Iterable[object], kind: type) -> None:
    """Raise TypeError for a value that is not exactly of that kind: true is no number here."""
    for value in values:
        if type(value) is not kind:
            raise TypeError(f"a {type(value).__name__} where {kind.__name__} should be")


def _is_path(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _wrong(what: str, error: Exception) -> RecordingError:
    return RecordingError(
        f"this recording's {what} event cannot be understood ({error}); "
        "it was made by another program, or damaged: record again"
    )


def absolute(path: Path) -> str:
    """Return a path as it can be found again from another folder."""
    return os.path.abspath(path)  # noqa: PTH100 - resolving links would name another file

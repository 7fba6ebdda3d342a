"""Writes a recording, in the order that `nbdproxy.recording.format` promises.

Nothing here waits: everything is a copy into shared memory (see `stream`), so a batch of requests
is recorded in a few microseconds each, and what was recorded survives the death of the process.
What `close`, or `sync` where that is wanted, brought to the disk survives the host losing power.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from xxhash import xxh3_64_intdigest

from nbdproxy.errors import RecordingError, RecordingFullError
from nbdproxy.private import open_folder, sync_folder
from nbdproxy.recording.format import (
    CHECKSUM,
    NONE,
    SLOT,
    SLOT_SIZE,
    SlotKind,
    data_path,
    events_path,
)
from nbdproxy.recording.meta import Ending, Meta, origin_of
from nbdproxy.recording.notes import NoteKind
from nbdproxy.recording.stream import StreamWriter
from nbdproxy.requests import Request

_EVENT_SEGMENT = 256 * 1024
_DATA_SEGMENT = 2 * 1024 * 1024
_SEGMENTS = 8
_RESERVE = 16 * 1024 * 1024
"""Free disk below which no recording is begun: the tails, and some room."""


class RecordingWriter:
    """A recording being made in the new directory `path`; safe to use from several threads.

    `durable` says that `sync` will be called. Raises RecordingError if the directory is not empty
    or not only ours, RecordingFullError from every call once the disk is full: nothing may pass
    then.
    """

    def __init__(self, path: Path, meta: Meta, *, durable: bool = False) -> None:
        self.path = path
        self.durable = durable
        self._folder = _make_directory(path)
        try:
            self._events = self._stream(events_path(path), _EVENT_SEGMENT)
            self._data = self._stream(data_path(path), _DATA_SEGMENT)
            if durable:
                _sync(path, self._folder)
        except BaseException:
            os.close(self._folder)
            raise
        self.meta = replace(meta, origin=origin_of(self._events.status))
        # Before-images come from the thread that lands a flush, all else from the event loop.
        self._lock = threading.RLock()
        self._start = time.monotonic_ns()
        self._text(SlotKind.META, 0, self.meta.dump())

    def _stream(self, path: Path, segment: int) -> StreamWriter:
        return StreamWriter(
            path, self._folder, segment=segment, segments=_SEGMENTS, durable=self.durable
        )

    @property
    def seq(self) -> int:
        """The position that the next event will have."""
        return self._events.position // SLOT_SIZE

    def has_room(self, payload: int) -> bool:
        """Tell whether a batch with that many bytes of payload can be recorded without waiting."""
        return self._data.has_room(payload) and self._events.has_room(_EVENT_SEGMENT)

    def wait_for_room(self, payload: int) -> None:
        """Block until such a batch can be recorded without waiting, or never will be."""
        self._data.wait_for_room(payload)
        self._events.wait_for_room(_EVENT_SEGMENT)

    def received(self, connection: int, requests: Sequence[Request]) -> int:
        """Record requests that were read together; return the first one's seq.

        They get consecutive positions.
        """
        with self._lock:
            return self._received(connection, requests)

    def _received(self, connection: int, requests: Sequence[Request]) -> int:
        self._check()
        first = self.seq
        now = time.monotonic_ns() - self._start
        slots = []
        append, kind = self._data.append, int(SlotKind.RECEIVED)
        for seq, (command, flags, cookie, offset, length, payload) in enumerate(requests, first):
            if payload:
                position, digest = append(payload), xxh3_64_intdigest(payload)
            else:
                position, digest = NONE, 0
            slot = SLOT.pack(
                kind,
                command,
                flags,
                connection,
                now,
                offset,
                length,
                cookie,
                position,
                digest,
            )
            slots.append(slot + CHECKSUM.pack(xxh3_64_intdigest(slot, seq)))
        self._events.append(b"".join(slots))
        return first

    def completed(self, connection: int, first: int, count: int, error: int) -> None:
        """Record that requests of consecutive seq are answered, all with the same error."""
        self._slot(
            SlotKind.COMPLETED, connection=connection, flags=error, offset=first, length=count
        )

    def refused(self, connection: int, request: Request, error: int) -> None:
        """Record a request that never reached the disk, and its answer."""
        with self._lock:
            seq = self._slot(
                SlotKind.REFUSED,
                command=min(request.command, 0xFF),
                flags=request.flags,
                connection=connection,
                offset=request.offset,
                length=request.length,
                cookie=request.cookie,
            )
            self.completed(connection, seq, 1, error)

    def before(self, offset: int, content: bytes | bytearray) -> None:
        """Save what the disk holds at `offset`, before it is changed for the first time."""
        if content.count(0) == len(content):
            self._slot(SlotKind.BEFORE, offset=offset, length=len(content))
            return
        with self._lock:
            self._check()
            self._slot(
                SlotKind.BEFORE,
                offset=offset,
                length=len(content),
                position=self._data.append(memoryview(content)),
                digest=xxh3_64_intdigest(content),
            )

    def note(self, kind: NoteKind, text: str = "", *, connection: int = 0) -> int:
        """Record an event that is not a request; return its seq."""
        return self._text(kind.slot_kind, connection, text)

    def sync(self) -> None:
        """Make durable what was recorded before this call; blocks.

        Raises RecordingError if that fails.
        """
        # What events speak of comes first.
        self._data.sync()
        self._events.sync()

    def close(self, ending: Ending) -> None:
        """Record how the run ended, and make all of it durable.

        Raises RecordingFullError if there is no room for that, RecordingError if it cannot be made
        durable; what was recorded stays readable.
        """
        errors: list[RecordingError] = []
        for step in (
            partial(self.note, NoteKind.END, ending.dump()),
            self._data.finish,
            self._events.finish,
        ):
            try:
                step()
            except RecordingError as error:
                errors.append(error)
        try:
            if errors:
                raise errors[0]
            # The files' names have to be on the disk before the tails go.
            _sync(self.path, self._folder)
            self._data.remove_tail()
            self._events.remove_tail()
            # Older than the files, a tail that came back would hide their ends.
            _sync(self.path, self._folder)
        except OSError as error:
            raise _not_durable(self.path, error) from None
        finally:
            with suppress(OSError):  # it has been synced
                os.close(self._folder)

    def _check(self) -> None:
        self._data.check()
        self._events.check()

    def _text(self, kind: SlotKind, connection: int, text: str) -> int:
        payload = text.encode(errors="surrogateescape")
        with self._lock:
            return self._slot(
                kind,
                connection=connection,
                length=len(payload),
                position=self._data.append(payload) if payload else NONE,
                digest=xxh3_64_intdigest(payload) if payload else 0,
            )

    def _slot(
        self,
        kind: SlotKind,
        *,
        command: int = 0,
        flags: int = 0,
        connection: int = 0,
        offset: int = 0,
        length: int = 0,
        cookie: int = 0,
        position: int = NONE,
        digest: int = 0,
    ) -> int:
        with self._lock:
            self._check()
            seq = self.seq
            now = time.monotonic_ns() - self._start
            fields = (command, flags, connection, now, offset, length, cookie, position, digest)
            body = SLOT.pack(kind, *fields)
            self._events.append(body + CHECKSUM.pack(xxh3_64_intdigest(body, seq)))
            return seq


def _make_directory(path: Path) -> int:
    """Make a folder that only we can add files to, and return its descriptor."""
    try:
        # Somebody else's file `base`, say, would be taken for the recording's.
        folder = open_folder(path, sticky=False, make=True)
    except OSError as error:
        if path.is_file():
            raise RecordingError(f"{path} is a file; name a new folder to record to") from None
        raise RecordingError(f"{path} cannot be made: {error.strerror}") from None
    try:
        if os.listdir(folder):  # noqa: PTH208 - of a descriptor
            raise RecordingError(
                f"{path} exists and is not empty; name a new folder, or remove it first"
            )
        free = shutil.disk_usage(folder).free
        if free < 2 * _RESERVE:
            raise RecordingFullError(
                f"only {free >> 20} MiB are free for the recording {path}; make room first"
            )
        _sync(path, folder)
    except BaseException:
        os.close(folder)
        raise
    return folder


def _sync(path: Path, folder: int) -> None:
    """Make the names in a recording's folder durable."""
    try:
        sync_folder(folder)
    except OSError as error:
        raise _not_durable(path, error) from None


def _not_durable(path: Path, error: OSError) -> RecordingError:
    return RecordingError(
        f"the recording {path} cannot be made durable: {error.strerror}; see to the disk that it "
        "is on, and record again"
    )

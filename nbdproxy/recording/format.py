"""The recording format, version 1. This docstring is its specification.

A recording is a directory with two append-only byte streams, all integers little-endian:

    events       64-byte slots; the slot at byte 64*n is event number n, its *seq*
    data         payloads, one after the other, without padding

While a stream is being written its newest part stands in `events.tail` or `data.tail`; after an
orderly end there is no tail. A reader lays the tail over the stream's file:

    tail         page 0 (4096 bytes): magic "NBDPTAIL", u32 version 1, u32 segments, u64 segment
                 size, then for each segment the u64 number of the block it holds, 2^64-1 for none;
                 then the segments. Block b is the stream's bytes [b*size, (b+1)*size) and, where
                 it stands in the tail, that is the one that counts.

A slot:

    offset size  field
         0    1  kind          see `SlotKind`
         1    1  command       of a request (NBD number), else 0
         2    2  flags         of a request (NBD command flags); of a COMPLETED, the NBD error
         4    4  connection    counted from 1; 0 where the event belongs to none
         8    8  time          nanoseconds of a monotonic clock since the recording began
        16    8  offset        of a request or before-image, in bytes of the disk; of a COMPLETED,
                               the seq of the first request it completes
        24    8  length        of a request or before-image in bytes; of a COMPLETED, how many
                               requests of consecutive seq it completes; of a text, its bytes
        32    8  cookie        of a request, the client's tag
        40    8  position      where the payload begins in `data`; 2^64-1 for none
        48    8  digest        xxh3-64 of the payload, 0 for none
        56    8  checksum      xxh3-64, with the slot's number as seed, of bytes 0 to 55

What is true of the order of slots, and what analyses rely on:

- Slot 0 is META: a JSON text (see `nbdproxy.recording.meta`).
- A RECEIVED slot stands in the recording before its request touches the disk, and its COMPLETED
  before the reply is sent. All requests that were read off the wire together are RECEIVED together,
  before anything is COMPLETED: "completed before received" can be told from the slots' numbers.
- A payload is complete in `data` before its slot is written.
- BEFORE is the disk's content under a range, saved before the range is changed for the first time.
  Together with META's map of what was not a hole it rebuilds the disk as it was at the start. A
  BEFORE without payload was all zero. Where two overlap the first counts: two clients may save the
  same place at once, and only the first surely comes before every change.
- REFUSED is a request that never reached the disk (read-only, out of range); `digest` and
  `position` are empty and `offset`, `length` are as the client sent them. Its COMPLETED follows.
- The notes (CONNECT to POLICY) are events with a text, which may be empty. FAULT tells that a rule
  of a policy struck a request, and stands behind its RECEIVED; POLICY which policies are in force.
- A recording whose last slot is not END was not ended in order.

A recorder killed at any instant leaves slots up to the last one whose checksum holds; the rest of
the tail is from an earlier use or half written and fails the checksum, because the slot's number
is its seed. A reader stops at the first slot that fails, or whose payload is not wholly there, and
says what is missing. Payload digests are checked when payloads are read.

A recording that was packed and unpacked (see `nbdproxy.recording.packed`) has further files:

    base         the parts of the disk as it was at the start that are not in the recording, each
                 at its offset in a sparse file of the disk's size; it stands for META's image
    pack.json    how many events there were when `base` was made. If fewer can be read now, then
                 before-images may be gone that `base` does not hold, and it must not be used.
    files.sha256, explore.db
                 a manifest and a database of verdicts; nothing here reads them

The recorder's host losing power: a recording that ended in order is durable, and so is, where that
was asked for, what was recorded before a flush was answered. For that, a segment of a tail is used
again only when its block is durable in the file and its number in the tail is durably gone. Else
the streams are not synced while they grow, and what is left may be anything.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from pathlib import Path

import numpy as np

VERSION = 1
SLOT = struct.Struct("<BBHIQQQQQQ")
CHECKSUM = struct.Struct("<Q")
SLOT_SIZE = 64
SLOTS = np.dtype(
    [
        ("kind", "u1"),
        ("command", "u1"),
        ("flags", "<u2"),
        ("connection", "<u4"),
        ("time", "<u8"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("cookie", "<u8"),
        ("position", "<u8"),
        ("digest", "<u8"),
        ("checksum", "<u8"),
    ]
)
"""Slots as numpy has them, the checksum included."""
NONE = 2**64 - 1

TAIL_MAGIC = b"NBDPTAIL"
TAIL_HEADER = struct.Struct("<8sIIQ")
TAIL_PAGE = 4096
TAIL_MAX = 256 * 1024 * 1024
"""Bytes of a tail, which a reader holds in memory; ours have 16 MiB."""


class SlotKind(IntEnum):
    """What a slot is."""

    META = 1
    RECEIVED = 2
    COMPLETED = 3
    BEFORE = 4
    REFUSED = 5
    CONNECT = 16
    DISC = 17
    EOF = 18
    TURNED_AWAY = 19
    MARK = 20
    QMP = 21
    CUT = 22
    LOSS = 23
    END = 24
    FAULT = 25
    POLICY = 26


def events_path(directory: Path) -> Path:
    """Return where a recording's events are."""
    return directory / "events"


def data_path(directory: Path) -> Path:
    """Return where a recording's payloads are."""
    return directory / "data"


def base_path(directory: Path) -> Path:
    """Return where an unpacked recording has what it needs of its image."""
    return directory / "base"


def index_path(directory: Path) -> Path:
    """Return where an unpacked recording has the index that it was packed with."""
    return directory / "pack.json"

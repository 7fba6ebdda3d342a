"""What the negotiation tells of an export: the same value whether we serve it or are told it."""

from __future__ import annotations

from dataclasses import dataclass

from nbdproxy.nbd.constants import (
    MAX_PAYLOAD,
    MIN_BLOCK,
    PREFERRED_BLOCK,
    ReplyStyle,
    TransmissionFlag,
)

READABLE = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
"""What every export can do. Its volatile cache belongs to the export, so MULTI_CONN holds."""

WRITABLE = (
    READABLE
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)
"""What a writable export can do besides."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One export.

    size         bytes
    flags        what it can do, apart from what depends on the connection (`flags_on`)
    min_block    offsets and lengths are multiples of this many bytes
    preferred    requests of at least so many bytes, aligned, are efficient
    max_payload  the most bytes of one READ or WRITE
    """

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    min_block: int = MIN_BLOCK
    preferred: int = PREFERRED_BLOCK
    max_payload: int = MAX_PAYLOAD

    def flags_on(self, style: ReplyStyle, *, contexts: bool) -> TransmissionFlag:
        """Return the flags on a connection with these replies, with or without contexts chosen.

        DF needs replies in chunks, and a filter of contexts needs extended headers and contexts
        (proto.md, "Transmission flags").
        """
        flags = self.flags
        if style is not ReplyStyle.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if style is ReplyStyle.EXTENDED and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

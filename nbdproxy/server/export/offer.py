"""What an export offers to its clients: what both nbdproxy and the disk below support."""

from __future__ import annotations

from nbdproxy.nbd.constants import MAX_PAYLOAD, MIN_BLOCK, PREFERRED_BLOCK, TransmissionFlag
from nbdproxy.nbd.export_info import READABLE, WRITABLE, ExportInfo


def offer(
    name: str,
    size: int,
    description: str,
    offered: ExportInfo | None,
    *,
    read_only: bool,
    shared: bool = True,
) -> ExportInfo:
    """Return what clients are told at negotiation (proto.md, "Transmission flags").

    `shared` is whether all connections have one disk, and one cache.
    """
    flags = READABLE | TransmissionFlag.READ_ONLY if read_only else WRITABLE
    if not shared:
        flags &= ~TransmissionFlag.CAN_MULTI_CONN
    if offered is None:
        return ExportInfo(name, size, flags, description)
    most = min(MAX_PAYLOAD, offered.max_payload)
    always = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY
    # All our clients share one connection below, so its cache is one for them all.
    always |= TransmissionFlag.CAN_MULTI_CONN
    # Nothing to be able to do, but a fact that schedulers go by.
    flags = flags & (offered.flags | always) | offered.flags & TransmissionFlag.ROTATIONAL
    return ExportInfo(
        name,
        size,
        flags,
        description,
        min_block=max(MIN_BLOCK, offered.min_block),
        preferred=min(max(PREFERRED_BLOCK, offered.preferred), _power_of_two(most)),
        max_payload=most,
    )


def _power_of_two(most: int) -> int:
    """Return the largest power of two that is not above `most`."""
    return 1 << (most.bit_length() - 1)

"""The checksums of ext4 and jbd2, in the kernel's convention: raw state in, raw state out.

The kernel's functions neither invert the seed nor the result, the usual libraries do both.
"""

from __future__ import annotations

import zlib

import google_crc32c

ONES = 0xFFFFFFFF
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def crc32c(seed: int, data: bytes) -> int:
    """Return the CRC-32C of `data`, continuing from the raw state `seed`."""
    value: int = google_crc32c.extend(seed ^ ONES, data)
    return value ^ ONES


def crc32_be(seed: int, data: bytes) -> int:
    """Return the most-significant-bit-first CRC-32 that jbd2's first checksums use.

    It is the usual CRC-32 seen in a mirror: bits of every byte, seed and result turned round.
    """
    return _mirror(zlib.crc32(data.translate(_REVERSED), _mirror(seed) ^ ONES) ^ ONES)


def _mirror(value: int) -> int:
    return int(f"{value:032b}"[::-1], 2)

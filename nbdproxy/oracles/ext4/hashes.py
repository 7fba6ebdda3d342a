"""The hash of a name in an indexed directory: legacy, half MD4 and TEA, signed and unsigned.

Source: "ext4 Disk Layout", section Hash Tree Directories, and the behaviour of Linux 6.1. All three
work on 32-bit words made of the name, whose bytes count as signed on some machines. SipHash, which
needs the key of an encrypted directory, is not covered.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from functools import lru_cache

MASK = 0xFFFFFFFF
END_OF_DIRECTORY = 0xFFFFFFFE
KEPT_MAX = 1 << 17
_MD4_START = struct.pack("<4I", 0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
# For each of the three rounds: what is added, the order of the words, and the rotations.
_MD4_ROUNDS = (
    (0, (0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19)),
    (0x5A827999, (1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13)),
    (0x6ED9EBA1, (3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15)),
)
_TEA_DELTA, _TEA_ROUNDS = 0x9E3779B9, 16
_LEGACY_START, _LEGACY_FACTOR, _LEGACY_FOLD = (0x12A3FE2D, 0x37ABE8F9), 7152373, 0x7FFFFFFF


class HashVersion(IntEnum):
    """The hashes that the root of an index may name."""

    LEGACY = 0
    HALF_MD4 = 1
    TEA = 2
    SIPHASH = 6


@lru_cache(KEPT_MAX)
def name_hash(version: int, name: bytes, seed: bytes, *, is_unsigned: bool) -> int:
    """Return the hash of a name: 32 bits, the lowest of them 0."""
    if version == HashVersion.LEGACY:
        value = _legacy(name, is_unsigned=is_unsigned)
    elif version == HashVersion.HALF_MD4:
        value = _half_md4(name, seed, is_unsigned=is_unsigned)
    else:
        value = _tea(name, seed, is_unsigned=is_unsigned)
    value &= ~1
    return value - 2 if value == END_OF_DIRECTORY else value


def _words(name: bytes, count: int, *, is_unsigned: bool) -> tuple[int, ...]:
    """Return `count` words of what is left of a name, filled up with its length."""
    pad = len(name) & 0xFF
    part = name[: 4 * count]
    rest = len(part) % 4
    if rest:
        part = part[:-rest] + bytes([pad]) * (4 - rest) + part[-rest:]
    part = part.ljust(4 * count, bytes([pad]))
    words: tuple[int, ...] = struct.unpack(f">{count}I", part)
    if is_unsigned or name.isascii():
        return words
    # A byte of 0x80 and more counts as negative: it takes one from the byte above it.
    found = list(words)
    for at, byte in enumerate(name[: 4 * count]):
        if byte >= 0x80:
            word = at // 4
            below = min(len(name[: 4 * count]) - 4 * word, 4) - 1 - at % 4
            found[word] = (found[word] - (0x100 << 8 * below)) & MASK
    return tuple(found)


def _half_md4(name: bytes, seed: bytes, *, is_unsigned: bool) -> int:
    state = struct.unpack("<4I", seed if any(seed) else _MD4_START)
    for at in range(0, len(name), 32):
        words = _words(name[at:], 8, is_unsigned=is_unsigned)
        a, b, c, d = state
        for number, (added, order, turns) in enumerate(_MD4_ROUNDS):
            for step in range(8):
                if number == 0:
                    mixed = d ^ (b & (c ^ d))
                elif number == 1:
                    mixed = (b & c) + ((b ^ c) & d)
                else:
                    mixed = b ^ c ^ d
                value = (a + mixed + words[order[step]] + added) & MASK
                turn = turns[step & 3]
                a, b, c, d = d, (value << turn | value >> (32 - turn)) & MASK, b, c
        w, x, y, z = state
        state = (w + a) & MASK, (x + b) & MASK, (y + c) & MASK, (z + d) & MASK
    return int(state[1])


def _tea(name: bytes, seed: bytes, *, is_unsigned: bool) -> int:
    low, high, *_ = struct.unpack("<4I", seed if any(seed) else _MD4_START)
    for at in range(0, len(name), 16):
        a, b, c, d = _words(name[at:], 4, is_unsigned=is_unsigned)
        total, left, right = 0, low, high
        for _ in range(_TEA_ROUNDS):
            total += _TEA_DELTA
            left += ((right << 4) + a) ^ (right + total) ^ ((right >> 5) + b)
            left &= MASK
            right += ((left << 4) + c) ^ (left + total) ^ ((left >> 5) + d)
            right &= MASK
        low, high = (low + left) & MASK, (high + right) & MASK
    return int(low)


def _legacy(name: bytes, *, is_unsigned: bool) -> int:
    last, before = _LEGACY_START
    for byte in name:
        value = byte if is_unsigned or byte < 0x80 else byte - 0x100
        mixed = (before + (last ^ (value * _LEGACY_FACTOR & MASK))) & MASK
        if mixed & 0x80000000:
            mixed = (mixed - _LEGACY_FOLD) & MASK
        last, before = mixed, last
    return last << 1 & MASK

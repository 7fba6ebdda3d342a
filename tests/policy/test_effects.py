"""What a faulty disk shows, what survives a cut, and the draws both hang on: pure functions.

Seen through a whole export in test_actions.py, on real disks in tests/laws/test_cut_policies.py.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdproxy.dice import DrawKey, draw, draw_below
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.policy.actions import Action, ActionKind, Keep
from nbdproxy.policy.effects import SECTOR, flipped, shown_after_write, stuck
from nbdproxy.policy.model import Survivors
from nbdproxy.policy.survival import surviving

seeds = st.integers(0, 1 << 63)
sectors = st.integers(1, 12)
draw_keys = st.builds(DrawKey, seeds, st.text(max_size=5), st.integers(1, 1000))


def overlaid(base: bytearray, shown: list[tuple[int, bytes]]) -> bytes:
    for offset, data in shown:
        base[offset : offset + len(data)] = data
    return bytes(base)


@given(draw_keys, sectors, st.sampled_from(Keep), st.none() | st.integers(0, 12))
def test_a_torn_write_is_old_or_new_sector_by_sector(
    draw_key: DrawKey, count: int, keep: Keep, written: int | None
) -> None:
    data, old = b"N" * SECTOR * count, b"O" * SECTOR * count
    action = Action(ActionKind.TEAR, keep=keep, sectors=written)
    found = overlaid(bytearray(data), shown_after_write(action, draw_key, 0, data, old))
    kinds = [found[at : at + SECTOR] for at in range(0, len(found), SECTOR)]
    assert set(kinds) <= {b"N" * SECTOR, b"O" * SECTOR}
    new = kinds.count(b"N" * SECTOR)
    if written is not None:
        assert new == min(written, count)
    elif count > 1:
        assert 1 <= new < count
    else:
        assert new == 0
    if keep is Keep.FRONT:
        assert kinds == sorted(kinds)
    elif keep is Keep.BACK:
        assert kinds == sorted(kinds, reverse=True)


@given(draw_keys, st.binary(min_size=1, max_size=64), st.integers(1, 600))
def test_as_many_bits_are_flipped_as_asked(draw_key: DrawKey, data: bytes, bits: int) -> None:
    found = flipped(data, bits, draw_key)
    differing = sum((a ^ b).bit_count() for a, b in zip(data, found, strict=True))
    assert differing == min(bits, 8 * len(data))
    assert flipped(data, bits, draw_key) == found


@given(draw_keys, st.integers(0, 3), sectors, st.integers(1, 4), st.integers(0, 1))
def test_stuck_bits_are_of_the_sector_not_of_the_read(
    draw_key: DrawKey, first: int, count: int, bits: int, value: int
) -> None:
    """Reading all at once, or sector by sector, at any time, shows the same."""
    action = Action(ActionKind.STICK, bits=bits, value=value)
    data = (b"\x00" if value else b"\xff") * SECTOR * count
    whole = stuck(data, first * SECTOR, action, draw_key)
    parts = [
        stuck(data[at : at + SECTOR], first * SECTOR + at, action, draw_key._replace(number=at + 1))
        for at in range(0, len(data), SECTOR)
    ]
    assert b"".join(parts) == whole
    for part, start in zip(parts, range(0, len(data), SECTOR), strict=True):
        wrong = sum((a ^ b).bit_count() for a, b in zip(part, data[start:], strict=False))
        assert 1 <= wrong <= bits


@pytest.mark.parametrize("value", [0, 1])
def test_as_many_bits_of_a_sector_are_stuck_as_asked(value: int) -> None:
    """A draw that comes twice is no second bit."""
    action = Action(ActionKind.STICK, bits=8 * SECTOR, value=value)
    assert (
        stuck(b"\x5a" * SECTOR, 0, action, DrawKey(1, "r", 1)) == (b"\x00", b"\xff")[value] * SECTOR
    )


@given(draw_keys, st.integers(0, 8), st.integers(-8, 8).filter(bool), sectors)
def test_a_misdirected_write_keeps_its_place_and_takes_another(
    draw_key: DrawKey, at: int, shift: int, count: int
) -> None:
    data, old = b"N" * SECTOR * count, b"O" * SECTOR * count
    action = Action(ActionKind.MISDIRECT, shift=shift * SECTOR)
    shown = shown_after_write(action, draw_key, at * SECTOR, data, old)
    assert shown == [(at * SECTOR, old), ((at + shift) * SECTOR, data)]


writes = st.lists(st.builds(Extent, st.integers(0, 20).map(lambda n: n * SECTOR),
                            st.integers(1, 5).map(lambda n: n * SECTOR)), max_size=12)  # fmt: skip


@given(st.sampled_from(Survivors), writes, seeds, st.sets(st.integers(0, 24)))
def test_what_survives_lies_in_its_write_and_in_order(
    survivors: Survivors, held: list[Extent], seed: int, meta: set[int]
) -> None:
    metadata = ExtentSet()
    for sector in meta:
        metadata.add(sector * SECTOR, (sector + 1) * SECTOR)
    found = surviving(survivors, held, seed, metadata)
    assert found == surviving(survivors, held, seed, metadata)
    assert [piece.write for piece in found] == sorted(piece.write for piece in found)
    for piece in found:
        write = held[piece.write]
        assert write.offset <= piece.start < piece.end <= write.end
        assert piece.start % SECTOR == piece.end % SECTOR == 0
    whole = [(i, write.offset, write.end) for i, write in enumerate(held)]
    chosen = [tuple(piece) for piece in found]
    held_sectors = {(i, s) for i, a, b in whole for s in range(a // SECTOR, b // SECTOR)}
    left = {(p.write, s) for p in found for s in range(p.start // SECTOR, p.end // SECTOR)}
    expected = {
        Survivors.FLUSHED: not chosen,
        Survivors.ALL: chosen == whole,
        Survivors.PREFIX: chosen == whole[: len(chosen)],
        Survivors.RANDOM: set(chosen) <= set(whole),
        Survivors.ALL_BUT_ONE: len(chosen) == max(0, len(whole) - 1) and set(chosen) <= set(whole),
        Survivors.TORN: left <= held_sectors,
        Survivors.METADATA: left == {(i, s) for i, s in held_sectors if s in meta},
        Survivors.DATA: left == {(i, s) for i, s in held_sectors if s not in meta},
    }
    assert expected[survivors]


def test_draws_are_even_and_hang_on_every_word() -> None:
    drawn = [draw(7, "rule", number) for number in range(20_000)]
    assert 0 <= min(drawn) < max(drawn) < 1
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.01
    counted = Counter(draw_below(10, 7, "rule", number) for number in range(20_000))
    assert set(counted) == set(range(10))
    assert max(counted.values()) < 1.2 * min(counted.values())
    assert len({draw(7, "a", 1), draw(8, "a", 1), draw(7, "b", 1), draw(7, "a", 2)}) == 4
    assert draw(7, "a", 1) == draw(7, "a", 1)


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
def test_a_draw_below_a_limit(limit: int) -> None:
    assert {draw_below(limit, 1, n) for n in range(10 * limit)} <= set(range(limit))

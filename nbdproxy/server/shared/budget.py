"""A number of units, such as bytes, of which several are taken at once."""

from __future__ import annotations

import trio


class Budget:
    """`total` units; who asks for more than are free waits.

    More than `total` is granted when nothing else is taken, so that it does not wait for ever:
    `release` must be called with the same number.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._lot = trio.lowlevel.ParkingLot()

    async def acquire(self, count: int) -> None:
        """Take `count` units, waiting until they are free."""
        while not self.take(count):
            await self._lot.park()

    def take(self, count: int) -> bool:
        """Take `count` units if they are free now; tell whether they were."""
        if self._taken and self._taken + count > self._total:
            return False
        self._taken += count
        return True

    def release(self, count: int) -> None:
        """Give them back."""
        self._taken -= count
        self._lot.unpark_all()

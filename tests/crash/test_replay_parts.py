"""What replay concludes before it judges: was the exit flush refused, is the disk blank."""

from __future__ import annotations

import pytest

from nbdproxy.crash.blame.replay import exit_flush_failed
from nbdproxy.disks.memory import MemoryDisk
from nbdproxy.oracles.blank import is_blank
from nbdproxy.requests import Command
from tests.support.persistence_reference import Completed, Received, table_of

FLUSH = Received(Command.FLUSH)
WRITE = Received(Command.WRITE, 0, 1)


@pytest.mark.parametrize(
    ("log", "t", "failed"),
    [
        ([], 0, False),
        ([FLUSH, Completed(0, 5)], 2, True),
        ([FLUSH, Completed(0, 5)], 1, False),
        ([FLUSH, Completed(0)], 2, False),
        ([FLUSH, Completed(0, 5), WRITE], 3, False),
        ([WRITE, Completed(0, 5)], 2, False),
    ],
)
def test_only_a_failed_last_flush_is_a_failed_exit_flush(
    log: list[Received | Completed], t: int, failed: bool
) -> None:
    assert exit_flush_failed(table_of(log), t) is failed


def test_one_byte_anywhere_is_not_blank() -> None:
    content = bytearray(3 << 20)
    assert is_blank(MemoryDisk(bytes(content)))
    content[-1] = 1
    assert not is_blank(MemoryDisk(bytes(content)))

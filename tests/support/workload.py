"""Random requests on several connections at once, each write recognisable sector by sector.

Every sector that a WRITE sends begins with the write's own number, so an image tells which write
stands where. `Load` also keeps a log of its own of what was sent and answered, in an order that is
never more optimistic than the truth: a request is noted before it is sent, a reply after it was
read. That log judges an image without believing the recording. An unaligned load begins and ends
its requests at any byte, and has no such log.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from nbdproxy.requests import Command
from tests.support.nbd_client import FLUSH, FUA, READ, TRIM, WRITE, ZERO, NbdClient, Op
from tests.support.persistence_reference import Completed, Received

SECTOR = 512
SECTORS = 256
SIZE = SECTOR * SECTORS
BLOCK = 4096
_STAMP = struct.Struct("<QQ")
_BASE = 1 << 62
"""Numbers from here on stand in the image before anything is written."""
_COMMANDS = (WRITE, ZERO, TRIM, FLUSH, READ)
_WEIGHTS = (62, 8, 8, 14, 8)
_OUTSTANDING = 160
"""More than the server's own limit of jobs in flight."""


def sector(number: int, at: int) -> bytes:
    """The content that write `number` gives sector `at`."""
    return _STAMP.pack(number, at) * (SECTOR // _STAMP.size)


def stamp(content: bytes, at: int) -> int:
    """Return the number of the write that left this in sector `at`; 0 for zeroes."""
    number, place = _STAMP.unpack_from(content)
    assert content in (bytes(SECTOR), sector(number, at)), f"sector {at} is torn or foreign"
    assert not number or place == at
    return int(number)


def make_image(path: Path, dice: random.Random, size: int = SIZE) -> None:
    """Make an image with data in some blocks, and holes between them."""
    with path.open("wb") as file:
        for block in range(SIZE // BLOCK):
            if dice.random() < 0.6:
                first = block * BLOCK // SECTOR
                file.seek(block * BLOCK)
                for at in range(first, first + BLOCK // SECTOR):
                    file.write(sector(_BASE + at, at))
        file.truncate(size)


def some_size(seed: int) -> int:
    """Return a disk's size for a seed: every other one is cut short inside its last sector."""
    return SIZE - (seed * 37 % (SECTOR - 1) + 1) * (seed % 2)


def is_base(number: int) -> bool:
    """Tell whether a stamp is one of `make_image`."""
    return number >= _BASE


class Load:
    """Threads, a connection each, that send requests until told to stop or the server is gone."""

    def __init__(
        self,
        connect: Callable[[], NbdClient],
        seed: int,
        connections: int,
        *,
        reconnects: bool = False,
        size: int = SIZE,
    ) -> None:
        """Begin at once. With `reconnects`, a lost connection is not the end of the server.

        A disk of another `size` than whole sectors gets an unaligned load.
        """
        self._connect = connect
        self.size = size
        self._reconnects = reconnects
        self.sent = 0
        """How many requests were sent, counted before they are."""
        self.log: list[Received | Completed] = []
        self.numbers: dict[int, int] = {}
        """The number of each WRITE, by its place in the log."""
        self.calm = threading.Event()
        """Set it, and every client collects its replies and leaves."""
        self._failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(seed * 100 + n, n + 1), daemon=True)
            for n in range(connections)
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until all threads have ended; raises what went wrong in one of them."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"
        if self._failures:
            raise self._failures[0]

    def _run(self, seed: int, number: int) -> None:
        dice = random.Random(seed)
        try:
            while not self.calm.is_set():
                try:
                    _Connection(self, self._connect(), dice, number).run()
                except OSError:  # the server is gone: that is how it ends
                    if not self._reconnects:
                        return
        except BaseException as error:
            self._failures.append(error)

    @property
    def is_unaligned(self) -> bool:
        """Whether requests begin and end at any byte."""
        return self.size % SECTOR > 0

    def note_sent(self, event: Received, number: int) -> int:
        """Put a request that is about to be sent into the log; return its place."""
        with self._lock:
            self.log.append(event)
            self.sent += 1
            place = len(self.log) - 1
            if number:
                self.numbers[place] = number
            return place

    def note_answered(self, place: int, error: int) -> None:
        """Put a reply that was read into the log."""
        with self._lock:
            self.log.append(Completed(place, error))


class _Connection:
    """One connection's life; some end early, in order or not."""

    def __init__(self, load: Load, client: NbdClient, dice: random.Random, number: int) -> None:
        self._load = load
        self._client = client
        self._dice = dice
        self._number = number
        self._places: dict[int, int] = {}

    def run(self) -> None:
        """Send bursts, each with one call, and collect some of the replies."""
        dice, client = self._dice, self._client
        try:
            while not self._load.calm.is_set():
                self._burst(dice.choice((1, 1, 1, 2, 5, 12, 40)))
                fate = dice.random()
                if fate < 0.4 or len(client.waiting) > _OUTSTANDING:
                    self._collect(len(client.waiting))
                elif fate < 0.7:
                    self._collect(dice.randrange(len(client.waiting) + 1))
                elif fate > 0.995:
                    return
            self._collect(len(client.waiting))
            client.disc()
        finally:
            client.drop()

    def _burst(self, count: int) -> None:
        packed = []
        for _ in range(count):
            op, number = self._op()
            if op.command != READ:
                first, sectors = op.offset // SECTOR, (op.length or len(op.data)) // SECTOR
                command, fua = Command(op.command), bool(op.flags & FUA)
                event = Received(command, first, sectors, fua, self._number)
                place = self._load.note_sent(event, number)
            cookie, data = self._client.pack(op)
            if op.command != READ:
                self._places[cookie] = place
            packed.append(data)
        self._client.sock.sendall(b"".join(packed))

    def _op(self) -> tuple[Op, int]:
        """Return a request, and the number of a WRITE."""
        dice = self._dice
        (command,) = dice.choices(_COMMANDS, _WEIGHTS)
        if command == FLUSH:
            return Op(FLUSH), 0
        if self._load.is_unaligned:
            return self._unaligned(command), 1
        count = dice.choice((1, 1, 2, 3, 8, 8, 16, 40))
        room = 24 if count <= 16 and dice.random() < 0.5 else SECTORS
        first = dice.randrange(room - count + 1)
        flags = FUA if command != READ and dice.random() < 0.25 else 0
        if command != WRITE:
            return Op(command, first * SECTOR, count * SECTOR, flags=flags), 0
        number = dice.randrange(1, _BASE)
        data = b"".join(sector(number, at) for at in range(first, first + count))
        return Op(WRITE, first * SECTOR, data=data, flags=flags), number

    def _unaligned(self, command: int) -> Op:
        """Return a request for any bytes, near others more often than not."""
        dice = self._dice
        length = dice.choice((1, 7, 100, 511, 512, 513, 1500, 4096, 20000))
        room = 8192 if length < 8192 and dice.random() < 0.6 else self._load.size
        offset = dice.choice((dice.randrange(room - length + 1), room - length))
        flags = FUA if command != READ and dice.random() < 0.25 else 0
        if command != WRITE:
            return Op(command, offset, length, flags=flags)
        return Op(WRITE, offset, data=dice.randbytes(length), flags=flags)

    def _collect(self, count: int) -> None:
        for _ in range(count):
            cookie, reply = self._client.receive()
            if cookie in self._places:
                self._load.note_answered(self._places.pop(cookie), reply.error)

"""Made-up logs of requests and replies, for laws about what a crash may leave."""

from __future__ import annotations

from hypothesis import strategies as st

from nbdproxy.persistence.model import Coverage, Options
from nbdproxy.requests import Command
from tests.support.persistence_reference import Completed, Received

SECTORS = 4
SECTOR = 512
COMMANDS = [
    *[Command.WRITE, Command.FLUSH] * 2,
    Command.WRITE_ZEROES,
    Command.TRIM,
]


@st.composite
def logs(draw: st.DrawFn, longest: int = 24) -> list[Received | Completed]:
    """Requests of two connections and their replies, in any order that time allows."""
    log: list[Received | Completed] = []
    open_requests: list[int] = []
    for _ in range(draw(st.integers(0, longest))):
        answers = draw(st.booleans())
        if open_requests and answers:
            request = draw(st.sampled_from(open_requests))
            open_requests.remove(request)
            log.append(Completed(request, error=draw(st.sampled_from([0, 0, 0, 5]))))
            continue
        open_requests.append(len(log))
        connection = draw(st.integers(1, 2))
        command = draw(st.sampled_from(COMMANDS))
        if command is Command.FLUSH:
            log.append(Received(command, connection=connection))
            continue
        first = draw(st.integers(0, SECTORS - 1))
        count = draw(st.integers(1, SECTORS - first))
        log.append(Received(command, first, count, draw(st.integers(0, 4)) == 0, connection))
    return log


options = st.builds(
    Options,
    coverage=st.sampled_from(Coverage),
    multi_conn=st.booleans(),
    fsyncgate=st.booleans(),
    losses=st.lists(st.integers(0, 24), max_size=2).map(tuple),
)

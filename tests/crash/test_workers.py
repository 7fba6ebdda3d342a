"""A worker that is told to end between two units tears no message that another will read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
from multiprocessing.connection import Connection
from pathlib import Path

from nbdproxy.crash.explore import workers
from nbdproxy.crash.explore.evaluator import EvaluatorSetup
from nbdproxy.persistence.model import Level, Options
from nbdproxy.state_server.commands import CommandPlan
from tests.support.recorded_runs import make
from tests.support.serving import until


def echo(job: EvaluatorSetup, requests: Connection, answers: Connection) -> None:
    """Begin as a worker does, and send back each message."""
    workers._IDLE_S = 2.0  # a busy machine may be late with the rest
    workers._begin(job)
    answers.send_bytes(b"ready")
    while True:
        answers.send_bytes(requests.recv_bytes())


def waits_for_input(pid: int) -> bool:
    """Tell whether a process sleeps in a read of a pipe or a socket."""
    return "read" in Path(f"/proc/{pid}/wchan").read_text()


def signals_taken(pid: int) -> bool:
    """Tell whether no SIGTERM is pending."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = [int(line.split()[1], 16) for line in status.splitlines() if "Pnd:" in line]
    return not any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending)


def test_a_message_that_has_begun_is_read_to_its_end(tmp_path: Path) -> None:
    run = make(tmp_path).run
    job = EvaluatorSetup(run, None, Level.FLUSHED, Options(), CommandPlan("true", 5))
    context = multiprocessing.get_context("spawn")
    requests, to_worker = context.Pipe(duplex=False)
    from_worker, answers = context.Pipe(duplex=False)
    process = context.Process(target=echo, args=(job, requests, answers))
    process.start()
    assert process.pid is not None
    assert from_worker.poll(30)
    assert from_worker.recv_bytes() == b"ready"
    message = b"all of it"
    framed = struct.pack("!i", len(message)) + message
    os.write(to_worker.fileno(), framed[:6])
    pid = process.pid
    until(lambda: waits_for_input(pid), "the worker waits for the rest")
    for _ in range(3):
        os.kill(pid, signal.SIGTERM)
        until(lambda: signals_taken(pid), "the signal came")
    os.write(to_worker.fileno(), framed[6:])
    assert from_worker.poll(10)
    assert from_worker.recv_bytes() == message
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM

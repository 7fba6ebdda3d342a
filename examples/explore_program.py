"""Does your own program keep what it promised when the power goes? No guest, no filesystem.

    python3 examples/explore_program.py './store "$uri"' './verify "$uri"'

The first command uses the disk at `$uri` as it likes. Its writes and flushes are recorded, and the
second command is run on the states that a power loss may leave after each flush: exit code 0 says
that a state is fine, 1 that it is not. Exit code as theirs: 1 if any state fails, 2 if that cannot
be told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbdproxy
from nbdproxy import Check, Every, ExploreRequest, Verdict

SIZE = 16 << 20


def main(program: str, check: str) -> int:
    """Record the program, explore, and print the states that fail."""
    with tempfile.TemporaryDirectory() as folder:
        image, run = Path(folder) / "disk.img", Path(folder) / "run"
        with image.open("wb") as file:
            file.truncate(SIZE)
        with nbdproxy.serve(image, record=run) as served:
            subprocess.run(program, shell=True, check=True, env={**os.environ, "uri": served.uri})
        with nbdproxy.Case.open(run) as case:
            request = ExploreRequest(every=Every.FLUSH, states=200)
            found = case.explore(request, Check(check, time_limit_s=10))
            verdicts = found.tally.verdicts
            print(f"{found.tally.visited} states, {verdicts[Verdict.FAIL]} fail")
            for state in found.failing(3):
                least = case.minimize(state, Check(check, time_limit_s=10))
                lost = ", ".join(f"request {missing.seq}" for missing in least.missing)
                print(f"  {state}: {lost or 'nothing'} is missing")
    return 1 if verdicts[Verdict.FAIL] else 2 if verdicts[Verdict.UNKNOWN] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

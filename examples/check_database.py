"""A check for CI: is an SQLite database sound in every state that a power loss may leave?

    python3 examples/check_database.py run1 /var/lib/app/state.db

`run1` is a recording of the disk on which the application used the database. States are explored
just before and after each flush; in each the database's folder is taken out of the filesystem, and
SQLite recovers and checks what is there. Exit code 0 if all states are sound, 1 if one is not, and
then the writes are named that were missing; 2 if it cannot be told.
"""

from __future__ import annotations

import shlex
import sys

import nbdproxy
from nbdproxy import Check, Every, ExploreRequest, Verdict

SOUND = """
import sqlite3, sys
try:
    found = sqlite3.connect(sys.argv[1]).execute("PRAGMA integrity_check").fetchall()
except sqlite3.DatabaseError as error:
    found = error
sys.exit(found != [("ok",)])
"""


def main(run: str, database: str) -> int:
    """Explore the states, and boil the first that fails down to the writes that it lacks."""
    python = shlex.join([sys.executable, "-c", SOUND])
    check = Check(f'{python} "$dir"{shlex.quote(database)}')
    with nbdproxy.Case.open(run) as case:
        found = case.explore(ExploreRequest(every=Every.FLUSH, states=500), check)
        verdicts = found.tally.verdicts
        print(f"{found.tally.visited} states: {verdicts[Verdict.PASS]} sound,", end=" ")
        print(f"{verdicts[Verdict.FAIL]} broken, {verdicts[Verdict.UNKNOWN]} unknown")
        for state in found.failing(1):
            least = case.minimize(state, check)
            print(f"{state} is broken as soon as these are missing:")
            for missing in least.missing:
                what = [owner.words() for owner in missing.owners]
                print(f"  request {missing.seq}: {', '.join(what)}")
    return 1 if verdicts[Verdict.FAIL] else 2 if verdicts[Verdict.UNKNOWN] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

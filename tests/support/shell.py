"""nbdsh, libnbd's own shell, as a real client: run code in it and get back what it tells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

PRELUDE = """
import errno, json, os, time

def outcome(call):
    "Return None for a success, else the name of what the server answered, or `gone`."
    try:
        call()
    except nbd.Error as error:
        return error.errno or "gone"
    return None

tell = lambda what: print(json.dumps(what))
"""


def nbdsh(*scripts: str, uri: str | None = None, timeout_s: float = 60) -> object:
    """Run code in nbdsh, connected to `uri` if given; return what it gave to `tell`."""
    found = shutil.which("nbdsh")
    assert found is not None, "nbdsh is not installed; Debian: apt-get install python3-libnbd"
    code = [PRELUDE, *map(textwrap.dedent, scripts)]
    where = [] if uri is None else ["-u", uri]
    done = subprocess.run(
        ["nbdsh", *where, *(word for part in code for word in ("-c", part))],
        # Its own module is that of the interpreter beside it.
        env={**os.environ, "PATH": f"{Path(found).parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

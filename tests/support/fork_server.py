"""Many short `nbdproxy` commands without paying for the interpreter's start each time.

One helper process imports each command when it is first asked for, and forks a child each time; a
child is then the real command in a process of its own, which can be sent any signal. The helper is
talked to in lines of JSON.

Not covered: what an import might do differently in a fresh process; `serving.Server` has that.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_HELPER = """
import gc, json, os, sys
import nbdproxy.cli.app
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        pid, status = os.waitpid(asked["wait"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        module = nbdproxy.cli.app.COMMANDS.get(asked["argv"][0], "").partition(":")[0]
        if module:
            __import__("nbdproxy.cli." + module)
        gc.freeze()
        answer = os.fork()
        if not answer:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, path in ((1, asked["out"]), (2, asked["err"])):
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                os.dup2(os.open(path, flags, 0o600), number)
            os.environ.update(asked["env"])
            sys.argv = ["nbdproxy", *asked["argv"]]
            code = 1
            try:
                nbdproxy.cli.app.main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    print(json.dumps(answer), flush=True)
"""


class ForkServer:
    """The helper: one process that has imported the command line and forks for each command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _HELPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )

    def ask(self, question: Mapping[str, object]) -> int | None:
        """Send one question and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer is None or isinstance(answer, int)
        return answer

    def start(
        self, argv: Sequence[str], out: Path, err: Path, environment: Mapping[str, str] = {}
    ) -> int:
        """Start `nbdproxy ARGV...`; return its process id."""
        where = {"out": str(out), "err": str(err)}
        pid = self.ask({"argv": list(argv), **where, "env": dict(environment)})
        assert pid is not None
        return pid

    def ended(self, pid: int) -> int | None:
        """Return the exit code of a command that has ended (negative for a signal), else None."""
        return self.ask({"wait": pid})

    def close(self) -> None:
        """End the helper."""
        self._process.communicate(timeout=10)


@functools.cache
def shared() -> ForkServer:
    """The one helper of this test run; it ends with it."""
    helper = ForkServer()
    atexit.register(helper.close)
    return helper

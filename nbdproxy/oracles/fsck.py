"""Runs e2fsck, the checker of the ext family, on a copy of a filesystem.

First only the journal is replayed (`-E journal_only`, without `-f`, which would repair); then
everything is checked and nothing changed (`-fn`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from nbdproxy.disks.copying import write_sparse
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.scratch import scratch_folder
from nbdproxy.oracles.examine import Fsck

FOLDERS = "/usr/sbin:/sbin"
"""Where e2fsck may be, besides the PATH: those of root only."""
LIMIT_S = 300.0
LINES = 12
_NOT_RUN = "e2fsck is not installed; run: sudo apt-get install e2fsprogs"
ERRORS_LEFT = 4
OPERATIONAL = 8
SIGNALLED = 128
"""Bits of the exit code of e2fsck(8): a filesystem that has errors, whatever else is set; and from
which on it says that it failed itself."""


def e2fsck(device: ReadableDevice) -> Fsck:
    """Return what e2fsck says of a filesystem, or why that cannot be told."""
    program = shutil.which("e2fsck", path=f"{os.environ.get('PATH', os.defpath)}:{FOLDERS}")
    if program is None:
        return Fsck(None, _NOT_RUN)
    try:
        with tempfile.TemporaryDirectory(prefix="nbdproxy-", dir=scratch_folder()) as folder:
            image = Path(folder) / "image"
            with image.open("xb") as file:
                write_sparse(device, file.fileno())
            code, said = _run([program, "-y", "-E", "journal_only", str(image)])
            if code == 0:  # not where it had to repair or make anew what is no journal
                code, said = _run([program, "-fn", str(image)])
    except OSError as error:
        return Fsck(None, f"e2fsck was not run: {error.strerror or error}")
    except subprocess.TimeoutExpired:
        return Fsck(None, f"e2fsck was not done after {LIMIT_S:g} s")
    return concluded("e2fsck", code, said.replace(str(image), "the disk"))


def concluded(program: str, code: int, said: str) -> Fsck:
    """Interpret a checker's exit code and output: its findings, or that it failed itself."""
    lines = [line for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(f"{program} ")][-LINES:]
    if code == 0 or _found_errors(program, code):
        return Fsck(code == 0, "\n".join(lines))
    ended = f"exit code {code}" if code > 0 else "it was killed, or could not be started"
    return Fsck(None, f"{program} failed ({ended}): {lines[-1] if lines else 'it said nothing'}")


def _found_errors(program: str, code: int) -> bool:
    """Tell whether an exit code other than 0 says that the filesystem has errors.

    Those of e2fsck are bits. xfs_repair -n, btrfs check, fsck.fat -n and ntfsresize have 1 for
    errors, and 2 for a log that is not replayed or a wrong usage, by their manual pages.
    """
    if program == "e2fsck":
        return 0 < code < SIGNALLED and (code < OPERATIONAL or bool(code & ERRORS_LEFT))
    return code == 1


def _run(argv: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT_S,
        check=False,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout

"""The programs in `examples/` do what they say."""

from __future__ import annotations

import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import nbdproxy
from tests.library.conftest import Prepared
from tests.support.ext4 import SIZE, replay_stage
from tests.support.nbd_client import NbdClient
from tests.support.serving import tool

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
STORE = """
import sys
from tests.support.nbd_client import NbdClient
client = NbdClient(sys.argv[1])
client.write(4096, b"content!" * 512)
if sys.argv[2] == "flush":
    client.flush()
client.write(0, b"ready!!!" * 64)
client.flush()
client.disc()
"""
VERIFY = """
import sys
from tests.support.nbd_client import NbdClient
client = NbdClient(sys.argv[1])
promised = client.read(0, 8) == b"ready!!!"
sys.exit(promised and client.read(4096, 4096) != b"content!" * 512)
"""


def example(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_they_are_all_tried() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {f"test_{name}" for name in names} <= set(globals())


def test_compare_modes(here: Prepared) -> None:
    done = example("compare_modes.py", "run1", "files.sha256")
    assert done.returncode == 0, done.stderr
    said = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "1 of 2 whole, at best 2  1 unflushed" in said["none"]
    assert "2 of 2 whole" in said["writethrough"]
    assert "0 of 2 whole" in said["unsafe"]


def database(folder: Path, *statements: str) -> bytes:
    """An SQLite database after some statements, each a transaction."""
    path = folder / "made.db"
    with sqlite3.connect(path, isolation_level=None) as opened:
        for statement in statements:
            opened.execute(statement)
    opened.close()
    return path.read_bytes()


@pytest.mark.parametrize("is_overwritten", [True, False])
def test_check_database(tmp_path: Path, *, is_overwritten: bool) -> None:
    """One that is overwritten in place may be broken; what happens elsewhere does it no harm."""
    image, run, content = (tmp_path / name for name in ("image", "run", "content"))
    with image.open("wb") as file:
        file.truncate(SIZE)
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", image)
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) "
    rows += "INSERT INTO t SELECT randomblob(2000) FROM n"
    images = []
    for statements in (["CREATE TABLE t (a)"], [rows, "CREATE INDEX u ON t (a)"]):
        content.write_bytes(database(tmp_path, *statements))
        for command in ("rm db", f"write {content} db"):
            tool("debugfs", "-w", "-R", command, image)
        images.append(image.read_bytes())
    image.write_bytes(images[0])
    with nbdproxy.serve(image, record=run) as served:
        client = NbdClient(served.uri)
        if is_overwritten:
            replay_stage(client, *images)
        else:
            client.write(SIZE - 4096, b"free" * 1024)  # blocks that no file has
        client.disc()
    done = example("check_database.py", run, "/db")
    if is_overwritten:
        assert done.returncode == 1, done.stderr
        assert "is broken as soon as these are missing:" in done.stdout
        assert "/db" in done.stdout
    else:
        assert done.returncode == 0, done.stderr
        assert " 0 broken, 0 unknown" in done.stdout


@pytest.mark.parametrize("is_careful", [True, False])
def test_explore_program(tmp_path: Path, *, is_careful: bool) -> None:
    """A promise that is written behind a flush of its content is kept, and else it is not."""
    how = "flush" if is_careful else "hope"
    store, verify = (shlex.join([sys.executable, "-c", code]) for code in (STORE, VERIFY))
    done = example("explore_program.py", f'{store} "$uri" {how}', f'{verify} "$uri"')
    assert done.returncode == (0 if is_careful else 1), done.stderr
    assert (", 0 fail" in done.stdout) == is_careful
    assert is_careful or "is missing" in done.stdout

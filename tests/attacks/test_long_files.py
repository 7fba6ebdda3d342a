"""Files that cost their maker nothing: what reading them takes is bounded by what they can say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbdproxy.errors import PolicyError
from nbdproxy.policy import loader

LINES = 100_000
BYTES_A_LINE = 450
"""Path, digest and entry of Python; before it was 900."""


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 20000) + " = 1\n",
        "[" + ".".join(['"a"'] * 10000) + "]\n",
        "x = " + "[" * 20000,
        "x = 'ordinary'\n" * 100_000,
    ],
    ids=["dotted key", "dotted table", "brackets", "size"],
)
def test_a_policy_is_refused_before_it_takes_memory(tmp_path: Path, text: str) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(text)
    code = (
        "import resource, sys; from nbdproxy.policy import loader; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)\n"
        "try: loader.read(Path(sys.argv[1]))\n"
        "except loader.PolicyError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, policy], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(str(policy))
    assert "is not TOML" not in done.stdout


def test_what_stands_in_strings_is_no_depth(tmp_path: Path) -> None:
    assert not loader.too_deep("summary = 'a. b. [" + "." * 500 + "' # " + "." * 500)
    policy = tmp_path / "p.toml"
    policy.write_bytes(b"summary = 'x'\r\nimitates = '" + b"." * 300 + b"'\r\nunknown = 1\r\n")
    with pytest.raises(PolicyError, match="unknown: unknown key"):
        loader.read(policy)


def test_a_long_manifest_takes_little_more_than_it_says(tmp_path: Path) -> None:
    files = tmp_path / "files"
    with files.open("w") as file:
        file.writelines(f"{number:064x}  /app/package/file{number}.js\n" for number in range(LINES))
    code = (
        "import resource, sys; from nbdproxy.oracles import manifest; from pathlib import Path\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = most(); found = manifest.load(Path(sys.argv[1]))\n"
        "print(len(found.entries), most() - before)"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, files],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    count, grown = map(int, done.stdout.split())
    assert count == LINES
    assert grown * 1024 < LINES * BYTES_A_LINE

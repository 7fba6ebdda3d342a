"""A fuzzing campaign: each target under atheris on a copy of its corpus.

    scripts/fuzz --seconds 60
    scripts/fuzz --runs 1000000 --target server
    scripts/fuzz --target server --input PATH     # repeats a finding

An exception, an input that takes longer than `HANG_S`, and a process that grows above `MEMORY_MB`
are findings: the input is kept below .cache/fuzz, and the exit code is 1. Fuzzing is not
reproducible but by the seed, which is printed; findings are.

Needs atheris: pip install -e '.[fuzz]' (Linux on x86_64).
"""

from __future__ import annotations

import argparse
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.seeds import CORPUS, dictionary
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / ".cache" / "fuzz"
HANG_S = 10
MEMORY_MB = 512
"""Ten times what a run needs; inputs are short, so nothing may need much."""

LONGEST_INPUT = 65536
"""Bytes of an input, if no stored one is longer: those of the protocol have hundreds."""
_LOG_LINES = 40
_STATUS = re.compile(r"^#\d+\s.*cov: (\d+).*rss: (\d+)Mb", re.MULTILINE)
_WRITTEN = re.compile(r"Test unit written to (.+)$", re.MULTILINE)
_FINAL = re.compile(r"^stat::(\w+):\s+(\d+)$", re.MULTILINE)


class Outcome(NamedTuple):
    """What a run came to. Memory is in MB; `found` is the input of a finding, `log` its story."""

    target: str
    executions: int
    per_second: int
    edges: int
    memory_start: int
    memory_peak: int
    memory_end: int
    found: Path | None
    log: str

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.executions} executions, {self.per_second}/s, "
            f"{self.edges} edges, memory {self.memory_start} MB at the start, "
            f"{self.memory_peak} MB at the peak, {self.memory_end} MB at the end"
        )


def fuzz(
    target: str,
    *,
    seed: int,
    findings: Path,
    runs: int = -1,
    seconds: int = 0,
    hang_s: int = HANG_S,
) -> Outcome:
    """Run one target until `runs` or `seconds` are over (0: no limit), or there is a finding."""
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nbdproxy-fuzz-") as name:
        copy, words = Path(name) / "corpus", Path(name) / "words"
        if (CORPUS / target).is_dir():
            shutil.copytree(CORPUS / target, copy)
        else:
            copy.mkdir()
        words.write_text(dictionary())
        limits = [f"-runs={runs}", f"-max_total_time={seconds}", f"-timeout={hang_s}"]
        limits += [f"-rss_limit_mb={MEMORY_MB}", f"-max_len={LONGEST_INPUT}"]
        where = [f"-artifact_prefix={findings}/", f"-dict={words}", str(copy)]
        more = [f"-seed={seed}", "-print_final_stats=1", "-verbosity=1"]
        code, log = _fuzzer(target, *limits, *more, *where)
    status = [(int(edges), int(memory)) for edges, memory in _STATUS.findall(log)] or [(0, 0)]
    final = {key: int(value) for key, value in _FINAL.findall(log)}
    written = _WRITTEN.search(log)
    assert code == 0 or written, f"the fuzzer did not start:\n{log}"
    return Outcome(
        target,
        final.get("number_of_executed_units", 0),
        final.get("average_exec_per_sec", 0),
        max(edges for edges, _ in status),
        status[0][1],
        final.get("peak_rss_mb", max(memory for _, memory in status)),
        status[-1][1],
        Path(written[1]) if written else None,
        "\n".join(log.splitlines()[-_LOG_LINES:]),
    )


def repeat(target: str, path: Path) -> tuple[int, str]:
    """Run one stored input, with the same limits; the exit code, and what the fuzzer says."""
    limits = f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MB}"
    return _fuzzer(target, *limits, str(path.resolve()))


def _fuzzer(target: str, *arguments: str) -> tuple[int, str]:
    # Peak memory is handed on by exec, so a large parent would be taken for growth: a shell that
    # forks stands in between.
    shell = ["/bin/sh", "-c", '"$@"; exit $?', "fuzzer"]
    command = [*shell, sys.executable, "-m", "tests.fuzz.fuzzer", target, *arguments]
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "pulse" in line:
                _say(f"  {line.strip()}")
    return process.returncode, "".join(lines)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(
    arguments: Sequence[str], *, targets: Iterable[str] = TARGETS, findings: Path = FINDINGS
) -> int:
    """Run what the command line asks for; 1 if there is a finding."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Fuzz the protocol cores and the readers."
    )
    parser.add_argument("--seconds", type=int, default=0, help="time for each target")
    parser.add_argument("--runs", type=int, default=-1, help="inputs for each target")
    parser.add_argument("--target", choices=[*targets], help="one target instead of all")
    parser.add_argument("--seed", type=int, default=None, help="of the mutations; else random")
    parser.add_argument("--input", type=Path, help="repeat this input of --target")
    options = parser.parse_args(arguments)
    if options.input is not None:
        if options.target is None or not options.input.is_file():
            parser.error("--input needs a file, and --target")
        code, log = repeat(options.target, options.input)
        _say(log)
        return int(code != 0)
    if options.seconds <= 0 and options.runs < 0:
        parser.error("say when to stop: --seconds or --runs")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    _say(f"seed {seed}")
    found = False
    for target in [options.target] if options.target else targets:
        outcome = fuzz(
            target,
            seed=seed,
            findings=findings / target,
            runs=options.runs,
            seconds=options.seconds,
        )
        _say(str(outcome))
        if outcome.found is not None:
            found = True
            path = outcome.found
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            _say(outcome.log)
            _say(f"finding: {shown}")
            _say(f"to repeat it: scripts/fuzz --target {target} --input {shown}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

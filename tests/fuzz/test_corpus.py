"""The stored inputs run through their targets, the seeds mean what they should, and a short run.

The corpus has the seeds, and inputs that were findings once. A longer run is `scripts/fuzz`.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from nbdproxy.nbd.constants import ReplyStyle, TlsMode
from nbdproxy.nbd.tables import COMMAND_RULES, OPTION_RULES
from nbdproxy.requests import Command
from tests.fuzz import client_target, server_target
from tests.fuzz.campaign import ROOT, fuzz, main
from tests.fuzz.seeds import CORPUS, dictionary, seeds
from tests.fuzz.targets import FAULTY, PROTOCOL, TARGETS
from tests.nbd import spec
from tests.nbd.wire import kinds, taken_apart

STORED = [path for target in TARGETS for path in sorted((CORPUS / target).iterdir())]
HAS_WHEEL = (
    sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 15)
)
# Where there is a wheel it has to be installed: a missing one fails the tests.
ATHERIS = pytest.mark.skipif(not HAS_WHEEL, reason="atheris has no wheel for this platform")


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"


@pytest.mark.parametrize("path", STORED, ids=name_of)
def test_a_stored_input_breaks_no_law(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("target", PROTOCOL)
def test_the_seeds_are_stored_as_the_tables_give_them(target: str) -> None:
    for name, data in seeds(target).items():
        stored = CORPUS / target / name
        assert stored.is_file(), "run python -m tests.fuzz.seeds"
        assert stored.read_bytes() == data, f"{stored.name}: run python -m tests.fuzz.seeds"
    assert len({*seeds(target).values()}) == len(seeds(target))


@pytest.mark.parametrize("number", OPTION_RULES)
def test_the_seeds_of_an_option_have_it_agreed_on(number: int) -> None:
    name = f"option-{spec.OPTIONS[number].name.lower()}"
    found = seeds("server")
    for seed in (name, f"{name}-tls-allow", f"{name}-tls-require"):
        events = taken_apart(server_target.meaning(found[seed]).events)
        behind_tls = seed != name and number == 5
        expected = spec.ERR_INVALID if behind_tls else spec.ACK
        if number == 1:
            assert kinds(events)[-1] == "opened"
        elif number != 5 or behind_tls:
            assert expected in [event[2] for event in events if event[1:2] == (number,)]


@pytest.mark.parametrize("style", ReplyStyle)
@pytest.mark.parametrize("number", COMMAND_RULES)
def test_the_seed_of_a_command_has_it_accepted(style: ReplyStyle, number: int) -> None:
    name = f"command-{style.name}-{Command(number).name}-plain".lower()
    event = server_target.meaning(seeds("server")[name]).events[-1]
    legal = number != Command.BLOCK_STATUS or style is not ReplyStyle.SIMPLE
    assert event[0] == ("request" if legal else "refused")


@pytest.mark.parametrize("style", ReplyStyle)
@pytest.mark.parametrize("number", COMMAND_RULES)
@pytest.mark.parametrize("kind", ["ok", "error"])
def test_the_seed_of_an_answer_has_it_finished(style: ReplyStyle, number: int, kind: str) -> None:
    if number == Command.BLOCK_STATUS and style is ReplyStyle.SIMPLE:
        return
    name = f"{style.name}-{Command(number).name}-{kind}".lower()
    outcome = client_target.outcome(seeds("client")[name])
    assert (outcome.breach, outcome.in_flight) == ("", 0)
    assert outcome.events[-1][:3] == ("Finished", 1, 0 if kind == "ok" else spec.EIO)
    outcome = client_target.outcome(seeds("client")[f"{style.name}-tls".lower()])
    assert ("StartTls",) in outcome.events
    assert outcome.in_flight == 0


def test_every_setting_of_the_server_is_chosen_by_some_byte() -> None:
    assert len(server_target.SERVERS) % len(TlsMode) == 0
    assert len(server_target.SERVERS) <= 256
    assert len(server_target.STEPS) * len(server_target.OWED) <= 256


def test_the_dictionary_is_of_a_form_that_the_fuzzer_reads() -> None:
    for line in dictionary().splitlines():
        assert re.fullmatch(r'"(\\x[0-9a-f]{2}){1,64}"', line)


@ATHERIS
@pytest.mark.parametrize("target", [*PROTOCOL, "lvm", "nbd-trlog"])
def test_a_short_run_finds_nothing(target: str) -> None:
    limits = ["--runs", "20000", "--seconds", "4", "--seed", "1"]
    command = [f"{ROOT}/scripts/fuzz", "--target", target, *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    figures = re.search(rf"^{target}: (\d+) executions, \d+/s, (\d+) edges", done.stdout, re.M)
    assert figures
    assert int(figures[1]) > (500 if target in PROTOCOL else 50)
    assert int(figures[2]) > 50


@ATHERIS
@pytest.mark.parametrize("kind", ["crash", "timeout", "oom"])
def test_an_exception_a_hang_and_growth_are_findings(kind: str, tmp_path: Path) -> None:
    fault = {"crash": "crash", "timeout": "hang", "oom": "grow"}[kind]
    outcome = fuzz(f"faulty-{fault}", seed=1, findings=tmp_path, seconds=60, hang_s=1)
    assert outcome.found is not None, outcome
    assert outcome.found.name.startswith(f"{kind}-")
    if kind == "crash":
        assert outcome.found.read_bytes()[:1] == b"!"
        assert "a faulty target" in outcome.log


@ATHERIS
def test_a_finding_is_told_with_what_repeats_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = partial(main, targets=FAULTY, findings=tmp_path)
    assert run(["--target", "faulty-crash", "--seconds", "60", "--seed", "1"]) == 1
    told = capfd.readouterr().out
    path = re.search(r"^finding: (.+)$", told, re.M)
    assert path
    # The same one is found again.
    assert run(["--target", "faulty-crash", "--seconds", "60", "--seed", "1"]) == 1
    assert f"finding: {path[1]}" in capfd.readouterr().out
    again = f"--target faulty-crash --input {path[1]}"
    assert f"to repeat it: scripts/fuzz {again}\n" in told
    assert run(again.split()) == 1
    assert "a faulty target" in capfd.readouterr().out
    harmless = tmp_path / "harmless"
    harmless.write_bytes(b"?")
    assert run(["--target", "faulty-crash", "--input", str(harmless)]) == 0

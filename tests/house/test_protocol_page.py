"""docs/protocol.md is what the tables give, and names every option, command, flag and limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdproxy.nbd import constants
from scripts.pages.protocol import page
from tests.nbd import spec

COMMITTED = Path(__file__).parents[2] / "docs" / "protocol.md"


def test_the_page_is_what_the_tables_give() -> None:
    assert COMMITTED.read_text() == page(), "run scripts/protocol-page and commit docs/protocol.md"


@pytest.mark.parametrize("number", spec.OPTIONS)
def test_each_option_has_a_line_with_its_errors(number: int) -> None:
    says = spec.OPTIONS[number]
    (line,) = [
        line for line in page().splitlines() if line.startswith(f"| {number} | {says.name} ")
    ]
    for error in says.errors:
        assert constants.OptionReply(error).name in line
    assert line.endswith("| yes |" if says.plaintext else "| no |")


@pytest.mark.parametrize("number", spec.COMMANDS)
def test_each_command_has_a_line_with_its_flags(number: int) -> None:
    says = spec.COMMANDS[number]
    (line,) = [
        line for line in page().splitlines() if line.startswith(f"| {number} | {says.name} ")
    ]
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    names = {spec.NO_HOLE: "NO_HOLE", spec.DF: "DF", spec.REQ_ONE: "REQ_ONE"}
    names[spec.FAST_ZERO] = "FAST_ZERO"
    assert cells[0] == ", ".join(names[flag] for flag in sorted(says.flags))
    assert cells[2].startswith("ENOSPC" if says.beyond == spec.ENOSPC else "EINVAL")
    assert cells[4:] == (["EPERM", "yes"] if says.modifies else ["", "no"])


def test_each_limit_has_its_value_and_its_reason() -> None:
    for name in ("MAX_PAYLOAD", "MAX_OPTIONS", "MAX_OPTION_DATA", "MAX_STRING", "MIN_BLOCK"):
        (line,) = [line for line in page().splitlines() if line.startswith(f"| `{name}` ")]
        _, value, why = (cell.strip() for cell in line.split("|")[1:-1])
        assert int(value.replace(" ", "")) == getattr(constants, name)
        assert len(why) > 20

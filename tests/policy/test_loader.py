"""Reading policy files: what is understood, and each refusal with file, key path and a way out.

That the gallery's examples hold is in test_examples.py.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import nbdproxy
from nbdproxy.errors import PolicyError
from nbdproxy.policy.examples import Step, parse_step
from nbdproxy.policy.loader import load, names, read
from nbdproxy.policy.model import CutEvent, Decision, FlushCovers, Policy, decide
from nbdproxy.requests import Command, CommandFlag

HEAD = 'summary = "s"\nimitates = "i"\n'
ROOT = Path(nbdproxy.__file__).parent.parent


def written(folder: Path, text: str) -> Path:
    """A policy file."""
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_gallery() -> None:
    assert names() == ["cut-at-shutdown", "drop-unflushed", "passthrough", "unsafe"]
    for name in names():
        file = load(name)
        assert file.policy.name == name
        assert "\n" not in file.policy.summary
        assert file.policy.imitates


def test_a_wheel_carries_the_gallery() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"policies": "nbdproxy/policies"}
    assert sorted(path.stem for path in (ROOT / "policies").glob("*.toml")) == names()


def test_everything_a_file_may_say(tmp_path: Path) -> None:
    text = HEAD + (
        '[cache]\nholds = true\n[flush]\ncovers = "nothing"\n'
        '[cut]\nat = ["exit", "disconnect", "shutdown"]\n'
        '[[example]]\ndo = ["write 3 Z fua", "trim 1", "exit"]\nimage = ["-", "-"]\n'
    )
    file = read(written(tmp_path, text))
    assert file.policy == Policy("mine", "s", "i", True, FlushCovers.NOTHING, frozenset(CutEvent))
    (example,) = file.examples
    assert example.image == ("-", "-")
    assert example.steps == (
        Step(Command.WRITE, 3, "Z", True),
        Step(Command.TRIM, 1, "0"),
        Step(None, event="exit"),
    )


def test_what_a_file_does_not_say_is_a_plain_disk(tmp_path: Path) -> None:
    policy = read(written(tmp_path, HEAD)).policy
    assert policy == Policy("mine", "s", "i", False, FlushCovers.COMPLETED, frozenset())


def test_a_path_is_read_and_a_name_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, HEAD)
    monkeypatch.chdir(tmp_path)
    assert load(str(path)).path == path
    assert load("mine.toml").policy.name == "mine"
    assert load("./mine.toml").policy.name == "mine"
    with pytest.raises(PolicyError, match="no policy named mine"):
        load("mine")


def test_an_unknown_name_suggests_the_nearest_or_lists_all() -> None:
    with pytest.raises(PolicyError, match="did you mean drop-unflushed"):
        load("drop-unflush")
    with pytest.raises(PolicyError, match=r"there are: cut-at-shutdown, .*, unsafe"):
        load("xyz")


REFUSED = {
    "summary missing": ('imitates = "i"', "summary: missing; add it"),
    "imitates missing": ('summary = "s"', "imitates: missing; add it"),
    "unknown key": (HEAD + 'sumary = "s"', "sumary: unknown key; did you mean summary"),
    "unknown key far from all": (HEAD + "zzz = 1", "zzz: unknown key; known keys: summary, "),
    "unknown key in a table": (
        HEAD + "[cache]\nhold = true",
        "cache.hold: unknown key; did you mean cache.holds",
    ),
    "unknown table": (HEAD + "[cash]\nholds = true", "cash: unknown key; known keys: summary"),
    "a table that is none": (HEAD + "cache = true", "cache: unknown key; did you mean cache.holds"),
    "a number for a text": ('summary = 1\nimitates = "i"', "summary: must be of type str"),
    "a number for a truth": (HEAD + "[cache]\nholds = 1", "cache.holds: must be of type bool"),
    "a text for a list": (HEAD + '[cut]\nat = "exit"', "cut.at: must be of type list"),
    "a bad choice": (
        HEAD + '[flush]\ncovers = "all"',
        "flush.covers: 'all' is not one of completed, nothing",
    ),
    "a bad choice in a list": (
        HEAD + '[cut]\nat = ["exit", "quit"]',
        "cut.at: 'quit' is not one of exit, disconnect, shutdown",
    ),
    "a list in a list": (HEAD + '[cut]\nat = [["exit"]]', "cut.at: ['exit'] is not one of"),
    "no sense": (
        HEAD + '[flush]\ncovers = "nothing"',
        "flush.covers: a flush that covers nothing has no effect unless cache.holds is true",
    ),
    "not TOML": ("summary = ", "is not TOML: "),
    "an example that is none": (HEAD + "example = [1]", "example[0]: must be a table"),
    "an example without its image": (
        HEAD + '[[example]]\ndo = ["flush"]',
        "example[0].image: missing; add it",
    ),
    "an unknown key of an example": (
        HEAD + "[[example]]\ndo = []\nimages = []",
        "example[0].images: unknown key; did you mean image",
    ),
    "an example's wrong type": (
        HEAD + '[[example]]\ndo = "flush"\nimage = []',
        "example[0].do: must be of type list",
    ),
    "a bad step": (
        HEAD + '[[example]]\ndo = ["flush"]\nimage = []\n'
        '[[example]]\ndo = ["flush", "write 0"]\nimage = []',
        'example[1].do[1]: "write 0" is not a step; write for example "write 0 A"',
    ),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PolicyError) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"there is no policy file .*; check the path"):
        load(str(tmp_path / "nothing.toml"))
    with pytest.raises(PolicyError, match="cannot be read: "):
        load(str(tmp_path) + "/")
    (tmp_path / "bytes.toml").write_bytes(b"summary = '\xff'")
    with pytest.raises(PolicyError, match="cannot be read"):
        load(str(tmp_path / "bytes.toml"))


STEPS = {
    "write 0 A": Step(Command.WRITE, 0, "A"),
    "write 12 b fua": Step(Command.WRITE, 12, "b", True),
    "zero 1": Step(Command.WRITE_ZEROES, 1, "0"),
    "trim 2 fua": Step(Command.TRIM, 2, "0", True),
    "flush": Step(Command.FLUSH),
    "disconnect": Step(None, event="disconnect"),
    "shutdown": Step(None, event="shutdown"),
    "exit": Step(None, event="exit"),
}


@pytest.mark.parametrize(("text", "step"), STEPS.items())
def test_a_step_means(text: str, step: Step) -> None:
    assert parse_step(text, "here") == step


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fua",
        "write",
        "write 0",
        "write 0 fua",
        "write A 0",
        "write -1 A",
        "write 0 AB",
        "write 0 A B",
        "zero",
        "zero 0 A",
        "zero 0 fua fua",
        "flush 0",
        "flush fua",
        "exit now",
        "read 0",
        "WRITE 0 A",
    ],
)
def test_what_is_no_step(text: str) -> None:
    with pytest.raises(PolicyError, match=r"^here: .* is not a step"):
        parse_step(text, "here")


PASS, HOLD = Decision.PASS, Decision.HOLD
CHANGES = [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM]


def policy(*, holds: bool, covers: FlushCovers = FlushCovers.COMPLETED) -> Policy:
    """A policy that matters only in these two."""
    return Policy("p", "s", "i", holds, covers, frozenset())


@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
@pytest.mark.parametrize("command", [Command.READ, Command.FLUSH, *CHANGES])
def test_without_a_cache_everything_passes(command: int, flags: int) -> None:
    assert decide(policy(holds=False), command, flags) is PASS


@pytest.mark.parametrize("covers", FlushCovers)
def test_reads_always_pass(covers: FlushCovers) -> None:
    assert decide(policy(holds=True, covers=covers), Command.READ, CommandFlag.FUA) is PASS


@pytest.mark.parametrize("command", CHANGES)
def test_a_cache_holds_changes_and_lands_fua(command: int) -> None:
    honest = policy(holds=True)
    assert decide(honest, command, 0) is HOLD
    assert decide(honest, command, CommandFlag.NO_HOLE) is HOLD
    assert decide(honest, command, CommandFlag.FUA) is Decision.HOLD_AND_LAND
    both = CommandFlag.FUA | CommandFlag.NO_HOLE
    assert decide(honest, command, both) is Decision.HOLD_AND_LAND


@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
def test_an_honest_flush_lands_and_a_lying_one_is_only_answered(flags: int) -> None:
    assert decide(policy(holds=True), Command.FLUSH, flags) is Decision.LAND
    lying = policy(holds=True, covers=FlushCovers.NOTHING)
    assert decide(lying, Command.FLUSH, flags) is Decision.ANSWER
    for command in CHANGES:
        assert decide(lying, command, flags) is HOLD

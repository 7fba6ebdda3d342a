"""Reading policy files: what is understood, and each refusal with file, key path and a way out.

That the gallery's examples hold is in test_examples.py; how rules decide in test_engine_law.py.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import nbdproxy
from nbdproxy.errors import PolicyError
from nbdproxy.policy.examples import Step, parse_step
from nbdproxy.policy.loader import load, names, read
from nbdproxy.policy.model import (
    CutEvent,
    FlushCovers,
    PowerCut,
    Survivors,
    VolatileCache,
    WriteBackOrder,
)
from nbdproxy.policy.words import sentences
from nbdproxy.requests import Command
from scripts.pages.policies import gallery, language

HEAD = 'summary = "s"\nimitates = "i"\n'
RULE = HEAD + "[[rule]]\n"
HOLDS = HEAD + "[cache]\nholds = true\n[[rule]]\n"
ROOT = Path(nbdproxy.__file__).parent.parent


def written(folder: Path, text: str) -> Path:
    """A policy file."""
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", names())
def test_the_gallery(name: str) -> None:
    file = load(name)
    assert file.name == name
    assert "\n" not in file.policy.summary
    assert len(file.policy.summary) <= 100
    assert file.policy.imitates.strip()
    assert file.policy.sources
    assert file.examples
    assert list(sentences(file.policy))


def test_a_wheel_carries_the_gallery() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"policies": "nbdproxy/policies"}
    assert sorted(path.stem for path in (ROOT / "policies").glob("*.toml")) == names()


def test_the_pages_are_what_the_tables_give() -> None:
    say = "run scripts/policy-pages and commit what it wrote"
    assert (ROOT / "docs" / "policies.md").read_text() == language(), say
    assert (ROOT / "policies" / "README.md").read_text() == gallery(), say


def test_everything_but_rules(tmp_path: Path) -> None:
    text = HEAD + (
        'sources = ["a", "b"]\n'
        '[cache]\nholds = true\nwindow = "64K"\norder = "random"\nage_s = 0.5\n'
        '[flush]\ncovers = "nothing"\n'
        '[cut]\nat = ["exit", "reset"]\nafter_s = 3\nsurvives = "torn"\n'
    )
    policy = read(written(tmp_path, text)).policy
    assert (policy.name, policy.sources) == ("mine", ("a", "b"))
    assert policy.cache == VolatileCache(True, 65536, WriteBackOrder.RANDOM, 0.5)
    assert policy.flush_covers is FlushCovers.NOTHING
    assert policy.cut == PowerCut(frozenset({CutEvent.EXIT, CutEvent.RESET}), 3.0, Survivors.TORN)
    assert not policy.rules


def test_what_a_file_does_not_say_is_a_plain_disk(tmp_path: Path) -> None:
    policy = read(written(tmp_path, HEAD)).policy
    assert (policy.cache, policy.cut) == (VolatileCache(), PowerCut())
    assert not policy.can_cut


def test_an_example(tmp_path: Path) -> None:
    text = (
        HEAD + '[[example]]\ndo = ["write 3 Z fua", "trim 1", "exit"]\nimage = ["-", "-", "-", "Z"]'
    )
    (example,) = read(written(tmp_path, text)).examples
    assert example.image == ("-", "-", "-", "Z")
    assert [(s.command, s.sector, s.letters, s.fua, s.event) for s in example.steps] == [
        (Command.WRITE, 3, "Z", True, ""),
        (Command.TRIM, 1, "", False, ""),
        (None, 0, "", False, "exit"),
    ]


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
    with pytest.raises(PolicyError, match=r"there are: bad-sectors, .*, writethrough-disk"):
        load("xyz")


REFUSED = {
    "summary missing": ('imitates = "i"', "summary: missing; add it"),
    "unknown key": (HEAD + 'sumary = "s"', "sumary: unknown key; did you mean summary"),
    "unknown key far from all": (HEAD + "zzz = 1", "zzz: unknown key; known: summary, "),
    "unknown key in a table": (
        HEAD + "[cache]\nhold = true",
        "cache.hold: unknown key; did you mean cache.holds",
    ),
    "a table that is none": (HEAD + "cache = true", "cache: must be a table"),
    "a number for a text": ('summary = 1\nimitates = "i"', "summary: must be a text"),
    "a number for a truth": (HEAD + "[cache]\nholds = 1", "cache.holds: must be true or false"),
    "a bad choice": (HEAD + '[flush]\ncovers = "all"', "flush.covers: 'all' is not one of"),
    "a bad choice in a list": (HEAD + '[cut]\nat = ["exit", "quit"]', "cut.at: 'quit' is not one"),
    "an empty list": (HEAD + "[cut]\nat = []", "cut.at: must not be an empty list"),
    "no sense": (HEAD + '[flush]\ncovers = "nothing"', "flush.covers: a flush that covers nothing"),
    "a window without a cache": (HEAD + '[cache]\nwindow = "1M"', "cache.window: has no effect"),
    "an order without a window": (
        HEAD + '[cache]\nholds = true\norder = "random"',
        "cache.order: has no effect without cache.window",
    ),
    "survivors without a cache": (
        HEAD + '[cut]\nat = ["exit"]\nsurvives = "all"',
        "cut.survives: has no effect",
    ),
    "not TOML": ("summary = ", "is not TOML: "),
    "an example that is none": (HEAD + "example = [1]", "example: must be a list of tables"),
    "an example that says nothing": (
        HEAD + '[[example]]\ndo = ["flush"]',
        "example[0]: says nothing that could be wrong",
    ),
    "an example's sector": (
        HEAD + '[[example]]\ndo = ["write 4 A"]\nimage = ["-"]',
        "example[0].do[0]: the disk has 1 sectors",
    ),
    "a bad step": (
        HEAD + '[[example]]\ndo = ["flush", "write 0"]\nimage = ["-"]',
        'example[0].do[1]: "write 0" is not a step; write for example "write 0 A"',
    ),
    "an example's unknown parameter": (
        HEAD + '[[example]]\ndo = ["flush"]\nimage = ["-"]\nset = { x = 1 }',
        "example[0].set: there is no parameter x; this policy has none",
    ),
    "a parameter that is used and not there": (
        HEAD + '[cache]\nholds = true\nwindow = "$size"',
        "cache.window: there is no parameter size",
    ),
    "a parameter that nothing uses": (
        HEAD + '[parameters]\nx = { default = 1, help = "h" }',
        'parameters.x: nothing has the value "$x"',
    ),
    "no action": (RULE + "nth = 1", "rule[0].action: missing"),
    "a key of another action": (
        RULE + 'action = "error"\nshift = 512',
        "rule[0].shift: does not belong to the action error",
    ),
    "a delay without its length": (RULE + 'action = "delay"', "rule[0].delay_s: missing"),
    "a command it cannot strike": (
        RULE + 'action = "tear"\ncommand = "read"',
        "rule[0].command: tear cannot strike read",
    ),
    "a lie without a cache": (RULE + 'action = "lie"', "rule[0].action: lie needs cache.holds"),
    "once and times": (
        RULE + 'action = "error"\nonce = true\ntimes = 2',
        "rule[0].once: contradicts times",
    ),
    "a flag it cannot have": (
        RULE + 'action = "flip"\nflags = "no-hole"',
        "rule[0].flags: none of its commands can have these",
    ),
    "a payload of a read": (
        RULE + 'action = "flip"\npayload = "zero"',
        "rule[0].payload: only a write has a payload",
    ),
    "a flush's place": (
        RULE + 'action = "error"\ncommand = "flush"\nrange = "0-1K"',
        "rule[0].range: a flush has no place",
    ),
    "an empty range": (RULE + 'action = "error"\nrange = "5-5"', "rule[0].range: '5-5' holds no"),
    "no event": (
        RULE + 'action = "error"\nsince = "noon"',
        "rule[0].since: 'noon' is not an event",
    ),
    "an nth that is no every-th": (
        RULE + 'action = "error"\nnth = 3\nevery = 2',
        "rule[0].nth: is not an every-th",
    ),
    "an nth that lies before": (
        RULE + 'action = "error"\nnth = 3\nafter_count = 3',
        "rule[0].nth: lies within after_count",
    ),
    "nothing between two counts": (
        RULE + 'action = "error"\nafter_count = 3\nbefore_count = 4',
        "rule[0].before_count: leaves nothing",
    ),
    "nothing between two times": (
        RULE + 'action = "error"\nafter_s = 3\nbefore_s = 3',
        "rule[0].before_s: is not later than after_s",
    ),
    "flags and their opposite": (
        RULE + 'action = "error"\nflags = "fua"\nwithout_flags = "fua"',
        "rule[0].without_flags: contradicts flags",
    ),
    "healed without a place": (
        RULE + 'action = "error"\nuntil_written = true',
        "rule[0].until_written: needs a place",
    ),
    "a miss that is no miss": (
        RULE + 'action = "misdirect"\nshift = 100',
        "rule[0].shift: must be a multiple of 512",
    ),
    "a shadow": (
        RULE + 'action = "error"\n[[rule]]\naction = "hang"\ncommand = "read"',
        "rule[1]: can never strike, because mine/rule 1 before it takes",
    ),
    "a name that is taken": (
        RULE + 'action = "error"\nname = "x"\nnth = 1\n[[rule]]\naction = "hang"\nname = "x"',
        "rule[1].name: 'x' is taken",
    ),
    "not hexadecimal": (
        RULE + 'action = "error"\ncontains = "hex:xy"',
        "rule[0].contains: 'hex:xy' is not hexadecimal",
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


ACCEPTED = {
    "an nth that is an every-th": RULE + 'action = "error"\nnth = 4\nevery = 2',
    "one between two counts": RULE + 'action = "error"\nafter_count = 3\nbefore_count = 5',
    "a lie in front of what it leaves": HOLDS + 'action = "lie"\n[[rule]]\naction = "tear"',
    "a turn in front of everything": RULE + 'action = "error"\nnth = 1\n[[rule]]\naction = "hang"',
    "another place": (
        RULE + 'action = "error"\nrange = "0-1K"\n[[rule]]\naction = "hang"\nrange = "512-2K"'
    ),
    "several ranges": RULE + 'action = "error"\nrange = ["0-1K", "4096-1M"]',
    "a rule that is left out": RULE + 'action = "lie"\nenabled = false',
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_makes_sense_is_taken(tmp_path: Path, text: str) -> None:
    read(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"there is no policy file .*; check the path"):
        load(str(tmp_path / "nothing.toml"))
    with pytest.raises(PolicyError, match="cannot be read: "):
        load(str(tmp_path) + "/")
    (tmp_path / "bytes.toml").write_bytes(b"summary = '\xff'")
    with pytest.raises(PolicyError, match="cannot be read"):
        load(str(tmp_path / "bytes.toml"))


def test_a_byte_order_mark_is_no_part_of_a_policy(tmp_path: Path) -> None:
    """Editors of Windows put one before UTF-8."""
    path = written(tmp_path, HEAD + "[cut]\nat = 'shutdown'")
    plain = read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == plain
    path.write_bytes(path.read_text("utf-8-sig").encode("utf-16"))
    with pytest.raises(PolicyError, match=r"cannot be read: .*; save it as UTF-8$"):
        read(path)


def step(text: str, command: Command | None, **values: object) -> Step:
    return Step(text, command, **values)  # type: ignore[arg-type]


STEPS = [
    step("write 0 A", Command.WRITE, letters="A"),
    step("write 2 AB fua", Command.WRITE, sector=2, count=2, letters="AB", fua=True),
    step("zero 1", Command.WRITE_ZEROES, sector=1),
    step("trim 2 3", Command.TRIM, sector=2, count=3),
    step("flush -> EIO", Command.FLUSH, outcome="EIO"),
    step("flush -> after 2", Command.FLUSH, after_s=2.0),
    step("read 0 -> after 0.5 B", Command.READ, outcome="B", after_s=0.5),
    step("read 0 2 -> AB", Command.READ, count=2, outcome="AB"),
    step("write 0 A -> gone", Command.WRITE, letters="A", outcome="gone"),
    step("exit", None, event="exit"),
    step("shutdown", None, event="qmp", word="SHUTDOWN"),
    step("client 2", None, event="client", word="2"),
    step("wait 1.5", None, event="wait", word="1.5"),
    step("mark go", None, event="mark", word="go"),
]


@pytest.mark.parametrize("wanted", STEPS, ids=lambda one: one.text)
def test_a_step_means(wanted: Step) -> None:
    assert parse_step(wanted.text, "here") == wanted


@pytest.mark.parametrize(
    "text",
    ["", "fua", "write", "write 0", "write A 0", "write -1 A", "zero", "zero 0 0", "flush 0",
     "flush fua", "exit now", "read 0 fua", "WRITE 0 A", "wait", "wait x", "client 0",
     "exit -> EIO", "flush -> what", "read 0 -> AB", "write 0 A ->", "flush -> after",
     "flush -> after x"],
)  # fmt: skip
def test_what_is_no_step(text: str) -> None:
    with pytest.raises(PolicyError, match=r"^here: .* is not a step"):
        parse_step(text, "here")

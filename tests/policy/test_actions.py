"""Each action and condition at work in the real `Export`: small policies with a story each.

A policy here is written as a user would, and its story is played by `dry_run`. Not covered: real
clients (tests/interop/test_gallery.py) and random rules (test_engine_law.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdproxy.policy.compose import compose
from nbdproxy.policy.examples import Example, parse_step
from nbdproxy.policy.loader import load, read
from nbdproxy.policy.model import Policy
from nbdproxy.server.export.dry_run import dry_run

HEAD = 'summary = "s"\nimitates = "i"\n'
CACHE = "[cache]\nholds = true\n"


def policy(folder: Path, text: str) -> Policy:
    path = folder / "mine.toml"
    path.write_text(HEAD + text)
    return read(path).policy


def play(wanted: Policy, story: str, *, seed: int = 0) -> tuple[str, str]:
    """Play a story of steps, one a line; return what the image holds and what reads show."""
    steps = tuple(parse_step(line.strip(), "story") for line in story.strip().splitlines())
    found = dry_run(wanted, Example(steps, seed=seed))
    assert found.wrong == ()
    return found.image, found.shows


STORIES = {
    "error": ('[[rule]]\naction = "error"\nerrno = "ENOMEM"\nnth = 1\n',
              "write 0 A -> ENOMEM\nwrite 1 B", "-B--", "-B--"),
    "error of a read": ('[[rule]]\naction = "error"\ncommand = "read"\n',
                        "write 0 A\nread 0 -> EIO", "A---", "A---"),
    "error of a flush keeps what is held": (
        CACHE + '[[rule]]\naction = "error"\ncommand = "flush"\nonce = true\n',
        "write 0 A\nflush -> EIO\nflush", "A---", "A---"),
    "a late error": ('[[rule]]\naction = "error"\ndelay_s = 7\n',
                     "read 0 -> after 7 EIO\nwrite 0 A -> after 7 EIO", "----", "----"),
    "delay of a flush": (CACHE + '[[rule]]\naction = "delay"\ndelay_s = 2\ncommand = "flush"\n',
                         "write 0 A\nflush -> after 2", "A---", "A---"),
    "delay of FUA": (CACHE + '[[rule]]\naction = "delay"\ndelay_s = 2\nflags = "fua"\n',
                     "write 0 A fua -> after 2\nwrite 1 B", "AB--", "AB--"),
    "hang": ('[[rule]]\naction = "hang"\ncommand = "flush"\n',
             "write 0 A\nflush -> silence\nwrite 1 B", "AB--", "AB--"),
    "drop before": ('[[rule]]\naction = "disconnect"\nnth = 1\n',
                    "write 0 A -> gone\nwrite 1 B", "-B--", "-B--"),
    "drop in the middle": ('[[rule]]\naction = "disconnect"\nmoment = "middle"\nnth = 1\n',
                           "write 0 A -> gone", "A---", "A---"),
    "drop after": ('[[rule]]\naction = "disconnect"\nmoment = "after"\nnth = 1\n',
                   "write 0 A -> gone", "A---", "A---"),
    "lose": ('[[rule]]\naction = "lose"\nnth = 1\n',
             "write 0 A\nread 0 -> -", "A---", "----"),
    "lose a trim": ('[[rule]]\naction = "lose"\ncommand = "trim"\n',
                    "write 0 A\ntrim 0\nread 0 -> A", "0---", "A---"),
    "an honest write heals": ('[[rule]]\naction = "lose"\nnth = 1\n',
                              "write 0 A\nwrite 0 B\nread 0 -> B", "B---", "B---"),
    "a lost write, lifted": ('[[rule]]\naction = "lose"\n',
                             "write 0 A\nlift\nread 0 -> A", "A---", "A---"),
    "tear the front": ('[[rule]]\naction = "tear"\nkeep = "front"\nsectors = 3\n',
                       "write 0 ABCD", "ABCD", "ABC-"),
    "tear the back": ('[[rule]]\naction = "tear"\nkeep = "back"\nsectors = 1\n',
                      "write 0 ABCD", "ABCD", "---D"),
    "misdirect": ('[[rule]]\naction = "misdirect"\nshift = -512\n',
                  "write 1 A", "-A--", "A---"),
    "misdirect off the disk": ('[[rule]]\naction = "misdirect"\nshift = "1M"\n',
                               "write 1 A", "-A--", "----"),
    "corrupt": ('[[rule]]\naction = "corrupt"\n', "write 0 A\nread 0 -> ?", "A---", "?---"),
    "stale": ('[[rule]]\naction = "stale"\nnth = 2\n',
              "write 0 A\nread 0 -> A\nwrite 0 B\nread 0 -> A\nread 0 -> B", "B---", "B---"),
    "flip": ('[[rule]]\naction = "flip"\nnth = 1\n',
             "read 0 -> ?\nread 0 -> -", "----", "----"),
    "cut at the second write": (CACHE + '[[rule]]\naction = "cut"\ncommand = "write"\nnth = 2\n',
                                "write 0 A fua\nwrite 1 B -> silence\nwrite 2 C -> silence",
                                "A---", "A---"),
    "cut at a byte": (CACHE + '[[rule]]\naction = "cut"\nafter_bytes = 1024\n',
                      "write 0 A\nflush\nwrite 1 B\nwrite 2 C -> silence", "A---", "A---"),
    "cut at a payload": (CACHE + '[[rule]]\naction = "cut"\ncontains = "XX"\n',
                         "write 0 A\nflush\nwrite 1 X -> silence", "A---", "A---"),
    "cut at a time": (CACHE + "[cut]\nafter_s = 10\n",
                      "write 0 A\nwait 11\nwrite 1 B -> silence", "----", "----"),
    "cut at a reset": (CACHE + '[cut]\nat = "reset"\n',
                       "write 0 A\nshutdown\nwrite 1 B\nreset\nflush -> silence", "----", "----"),
    "cut at a powerdown, all survive": (
        CACHE + '[cut]\nat = "powerdown"\nsurvives = "all"\n',
        "write 0 A\npowerdown", "A---", "A---"),
    "written back by age": (CACHE + "age_s = 5\n[cut]\nat = \"exit\"\n",
                            "write 0 A\nwait 6\nwrite 1 B\nexit", "A---", "AB--"),
    "written back, newest first": (
        CACHE + 'window = 512\norder = "newest"\n[cut]\nat = "exit"\n',
        "write 0 A\nwrite 1 B\nexit", "-B--", "AB--"),
    "a flush empties the window": (
        CACHE + 'window = 1024\norder = "newest"\n[cut]\nat = "exit"\n',
        "write 0 A\nflush\nwrite 1 B\nwrite 2 C\nexit",
        "A---",
        "ABC-",
    ),
    "since a mark": ('[[rule]]\naction = "error"\nsince = "mark:go"\nuntil = "mark:stop"\n',
                     "write 0 A\nmark go\nwrite 1 B -> EIO\nmark stop\nwrite 2 C", "A-C-", "A-C-"),
    "since QEMU said so": ('[[rule]]\naction = "error"\nsince = "qmp:RESET"\n',
                           "write 0 A\nreset\nwrite 1 B -> EIO", "A---", "A---"),
    "since the first flush": ('[[rule]]\naction = "error"\nsince = "first-flush"\n',
                              "write 0 A\nflush\nwrite 1 B -> EIO", "A---", "A---"),
    "of the second client": ('[[rule]]\naction = "error"\nconnection = 2\n',
                             "write 0 A\nclient 2\nwrite 1 B -> EIO\nclient 1\nwrite 2 C",
                             "A-C-", "A-C-"),
    "in a range": ('[[rule]]\naction = "error"\nrange = "512-1K"\n',
                   "write 0 A\nwrite 1 B -> EIO\nread 0 4 -> EIO\nwrite 2 C", "A-C-", "A-C-"),
    "payload of zeroes": ('[[rule]]\naction = "error"\npayload = "data"\n',
                          "write 0 A -> EIO\nzero 1", "-0--", "-0--"),
    "later than": ('[[rule]]\naction = "error"\nafter_s = 10\n',
                   "write 0 A\nwait 11\nwrite 1 B -> EIO", "A---", "A---"),
    "pass": ('[[rule]]\naction = "pass"\nrange = "0-512"\n[[rule]]\naction = "error"\n',
             "write 0 A\nwrite 1 B -> EIO", "A---", "A---"),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_a_story(tmp_path: Path, story: tuple[str, str, str, str]) -> None:
    text, steps, image, shows = story
    assert play(policy(tmp_path, text), steps) == (image, shows)


@pytest.mark.parametrize("violation", ["magic", "cookie", "twice", "garbage"])
def test_a_reply_that_breaks_the_protocol(tmp_path: Path, violation: str) -> None:
    rule = f'[[rule]]\naction = "violate"\nviolation = "{violation}"\nnth = 1\n'
    story = "write 0 A -> nonsense\nwrite 1 B"
    assert play(policy(tmp_path, rule), story) == ("AB--", "AB--")


def test_policies_work_together() -> None:
    slow = load("slow-disk").with_settings({"delay_s": 2, "jitter_s": 0})
    bad = load("bad-sectors").with_settings({"share": 1.0, "delay_s": 5})
    both = compose([slow, bad, load("drop-unflushed").policy])
    assert both.name == "slow-disk+bad-sectors+drop-unflushed"
    story = "read 0 -> after 7 EIO\nwrite 0 A -> after 2\nread 0 -> after 2 A\nexit"
    assert play(both, story) == ("----", "A---")


def test_a_flush_that_covers_nothing_fails_as_well() -> None:
    both = compose([load("fsyncgate").policy, load("unsafe").policy])
    assert play(both, "write 0 A\nflush -> EIO\nflush\nexit") == ("----", "A---")


def test_a_seed_decides(tmp_path: Path) -> None:
    wanted = policy(tmp_path, CACHE + '[cut]\nat = "exit"\nsurvives = "random"\n')
    story = "write 0 A\nwrite 1 B\nwrite 2 C\nwrite 3 D\nexit"
    images = [play(wanted, story, seed=seed)[0] for seed in range(40)]
    assert images == [play(wanted, story, seed=seed)[0] for seed in range(40)]
    assert len(set(images)) > 8


@pytest.mark.parametrize(
    ("survives", "images"),
    [
        ("prefix", {"----", "A---", "AB--", "ABC-"}),
        ("all-but-one", {"-BC-", "A-C-", "AB--"}),
        ("all", {"ABC-"}),
        ("flushed", {"----"}),
    ],
)
def test_what_survives(tmp_path: Path, survives: str, images: set[str]) -> None:
    wanted = policy(tmp_path, CACHE + f'[cut]\nat = "exit"\nsurvives = "{survives}"\n')
    story = "write 0 A\nwrite 1 B\nwrite 2 C\nexit"
    assert {play(wanted, story, seed=seed)[0] for seed in range(60)} == images


def test_a_wrong_story_is_noticed(tmp_path: Path) -> None:
    wanted = policy(tmp_path, '[[rule]]\naction = "lose"\n')
    steps = tuple(parse_step(text, "") for text in ("write 0 A -> EIO", "read 0 -> A"))
    assert dry_run(wanted, Example(steps, shows=("A",))).wrong == (
        'step "write 0 A -> EIO": the outcome is ok',
        'step "read 0 -> A": the outcome is -',
        "shows is - and not A",
    )

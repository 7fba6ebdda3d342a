"""Where rules strike: regions and files are looked up in a real ext4, whole or in a partition.

What `survives = "metadata"` and `"data"` leave is seen on a served image. What debugfs says of the
same image is the reference.
"""

from __future__ import annotations

import re
import signal
from contextlib import closing
from pathlib import Path

import pytest

from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import PolicyError
from nbdproxy.lab.guest.disk import PARTITION_START, format_disk
from nbdproxy.policy.loader import read
from nbdproxy.server.export.places import find_places
from tests.support.forked import ForkedServer
from tests.support.serving import nbdproxy, tool

MIB = 1 << 20
BLOCK = 4096
HEAD = 'summary = "s"\nimitates = "i"\n'


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 with a file /data/db of 20 blocks."""
    (tmp_path / "tree" / "data").mkdir(parents=True)
    (tmp_path / "tree" / "data" / "db").write_bytes(b"x" * 20 * BLOCK)
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    tool("mke2fs", "-q", "-t", "ext4", "-b", str(BLOCK), "-d", tmp_path / "tree", path)
    return path


def places(image: Path, rule: str) -> list[tuple[int, int]]:
    """Where a rule with this condition strikes: blocks [first, last)."""
    policy = image.parent / "mine.toml"
    policy.write_text(f'{HEAD}[[rule]]\naction = "error"\n{rule}\n')
    with closing(FileDisk(image, read_only=True)) as disk:
        found = find_places(read(policy).policy, disk).of_rules["mine/rule 1"]
    assert found is not None
    return sorted((extent.offset // BLOCK, extent.end // BLOCK) for extent in found)


def blocks_of(image: Path, what: str) -> set[int]:
    """The blocks of a file or an inode, by debugfs."""
    return {int(word) for word in tool("debugfs", "-R", f"blocks {what}", image).split()}


def flat(ranges: list[tuple[int, int]]) -> set[int]:
    return {block for first, last in ranges for block in range(first, last)}


def test_a_file(image: Path) -> None:
    assert flat(places(image, 'file = "/data/db"')) == blocks_of(image, "/data/db")


def test_the_journal(image: Path) -> None:
    assert flat(places(image, 'region = "ext4:journal"')) == blocks_of(image, "<8>")


def test_the_metadata(image: Path) -> None:
    found = flat(places(image, 'region = "ext4:metadata"'))
    told = tool("dumpe2fs", image)
    for kind in ("Block bitmap", "Inode bitmap", "Inode table"):
        for first, last in re.findall(rf"{kind} at (\d+)(?:-(\d+))?", told):
            assert set(range(int(first), int(last or first) + 1)) <= found
    assert 0 in found
    assert blocks_of(image, "<8>") <= found
    assert not blocks_of(image, "/data/db") & found


def test_a_partition(tmp_path: Path) -> None:
    path = tmp_path / "image"
    format_disk(path, 32 * MIB, partition_table="gpt")
    ((first, last),) = places(path, 'region = "partition:1"')
    assert first == PARTITION_START // BLOCK
    journal = flat(places(path, 'region = "ext4:journal:1"'))
    assert journal
    assert journal < set(range(first, last))


def test_a_range_is_cut_to_the_disk(image: Path) -> None:
    assert places(image, 'range = "16M-1T"') == [(16 * MIB // BLOCK, 32 * MIB // BLOCK)]


REFUSED = {
    'region = "moon"': "rule[0].region: 'moon' is no region",
    'region = "partition:3"': "rule[0].region: there is no partition 3; the disk has: none",
    'region = "ext4:journal:2"': "rule[0].region: there is no partition 2",
    'file = "/data/none"': "rule[0].file: whole disk: there is no /data/none in it",
    'file = "data/db"': "rule[0].file: 'data/db' is no path from the top",
    'range = "1T-2T"': "rule[0].range: lies behind the end of the disk",
}


@pytest.mark.parametrize(("rule", "words"), REFUSED.items(), ids=REFUSED)
def test_what_the_disk_does_not_have_is_refused(image: Path, rule: str, words: str) -> None:
    with pytest.raises(PolicyError) as refused:
        places(image, rule)
    assert words in str(refused.value)
    told = nbdproxy("serve", image, "--policy", image.parent / "mine.toml", code=2)
    assert words in told.stderr


def test_no_filesystem(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    with pytest.raises(PolicyError, match=r"rule\[0\].region: whole disk: "):
        places(path, 'region = "ext4:journal"')


@pytest.mark.parametrize("survives", ["metadata", "data"])
def test_what_an_adversary_leaves(image: Path, survives: str) -> None:
    bitmap = int(re.findall(r"Block bitmap at (\d+)", tool("dumpe2fs", image))[0])
    content = min(blocks_of(image, "/data/db"))
    before = image.read_bytes()
    policy = image.parent / "mine.toml"
    policy.write_text(f'{HEAD}[cache]\nholds = true\n[cut]\nat = "exit"\nsurvives = "{survives}"\n')
    with ForkedServer(image.parent, image, "--policy", policy) as server:
        client = server.client()
        for block in (bitmap, content):
            client.write(block * BLOCK, b"Z" * BLOCK)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
        client.drop()
    after = image.read_bytes()
    starts = range(0, len(after), BLOCK)
    changed = {at // BLOCK for at in starts if after[at : at + BLOCK] != before[at : at + BLOCK]}
    assert changed == {bitmap if survives == "metadata" else content}

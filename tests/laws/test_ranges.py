"""What a state lacks of a file: put back just that, and the file is whole."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from nbdproxy.crash.blame.block_owners import RecordingOwners
from nbdproxy.crash.blame.ranges import Losses, LossFinder
from nbdproxy.crash.states.naming import Choice, RequestPart, StateId
from nbdproxy.crash.states.recorded import RecordedSource
from nbdproxy.crash.states.timeline import Timeline
from nbdproxy.oracles.check import Verdict, check
from nbdproxy.oracles.manifest import Entry, Manifest
from nbdproxy.oracles.mounts import Tree
from nbdproxy.persistence.model import Level
from tests.support import ext4
from tests.support.forked import ForkedServer
from tests.support.serving import tool

BLOCK = ext4.BLOCK
LEVELS = (Level.NOTHING, Level.FLUSHED, Level.COMPLETED)
Opened = tuple[Timeline, list[Entry]]


def differing(one: bytes, other: bytes) -> list[int]:
    """The blocks in which two images differ."""
    return [n for n in range(len(one) // BLOCK) if _block(one, n) != _block(other, n)]


def _block(image: bytes, number: int) -> bytes:
    return image[number * BLOCK : (number + 1) * BLOCK]


def journaled(folder: Path, before: bytes, after: bytes, name: str) -> bytes:
    """The step to `after` as a guest makes it: data in its place, all else in the journal only."""
    content = ext4.content(name)
    data = {content[at : at + BLOCK].ljust(BLOCK, b"\0") for at in range(0, len(content), BLOCK)}
    mine = [n for n in differing(before, after) if _block(after, n) in data]
    others = [n for n in differing(before, after) if n not in mine and n != 0]
    image, copies = folder / "journaled", folder / "copies"
    made = bytearray(before)
    for number in mine:
        made[number * BLOCK : (number + 1) * BLOCK] = _block(after, number)
    image.write_bytes(made)
    copies.write_bytes(b"".join(_block(after, number) for number in others))
    listed = ",".join(map(str, others))
    script = folder / "script"
    script.write_text(f"jo -c -v 3\njw -b {listed} {copies}\njc\n")
    tool("debugfs", "-w", "-f", script, image)
    return image.read_bytes()


def record(folder: Path, images: list[bytes]) -> Iterator[Opened]:
    """Write each image over the one before, a request a block, data first.

    Flushed is the first step, and of the second all but what leads to the data.
    """
    (folder / "image").write_bytes(images[0])
    options = ("--format", "raw", "--record", folder / "run")
    with ForkedServer(folder, folder / "image", *options) as server:
        client = server.client()
        for before, after in pairwise(images):
            numbers = differing(before, after)[::-1]
            for at, number in enumerate(numbers):
                if at == len(numbers) - 4:
                    client.flush()
                client.write(number * BLOCK, _block(after, number))
            if after is images[1]:
                client.flush()
        client.disc()
        server.signal(signal.SIGTERM)
        server.wait()
    entries = [
        Entry(f"/{n}", hashlib.sha256(ext4.content(n)).hexdigest(), len(ext4.content(n)))
        for n in (ext4.FLUSHED, ext4.UNFLUSHED)
    ]
    with RecordedSource(folder / "run") as source, closing(Timeline(source)) as timeline:
        yield timeline, entries


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("plain")
    yield from record(folder, ext4.stages(folder))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("logged")
    images = ext4.stages(folder)
    images[2] = journaled(folder, images[1], images[2], ext4.UNFLUSHED)
    yield from record(folder, images)


@pytest.fixture(scope="module")
def below_qcow2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """The same files, each step written into a qcow2 file by QEMU."""
    folder = tmp_path_factory.mktemp("qcow2")
    file, images = folder / "file", []
    first, *later = ext4.stages(folder)
    (folder / "raw").write_bytes(first)
    options = ("-O", "qcow2", "-o", f"cluster_size={BLOCK}")
    tool("qemu-img", "convert", "-f", "raw", *options, folder / "raw", file)
    images.append(file.read_bytes())
    before = first
    for after in later:
        words: list[str] = []
        for number in differing(before, after):
            part = folder / f"part-{number}"
            part.write_bytes(_block(after, number))
            words += ["-c", f"write -q -s {part} {number * BLOCK} {BLOCK}"]
        tool("qemu-io", "-f", "qcow2", *words, file)
        images.append(file.read_bytes())
        before = after
    size = -(-max(map(len, images)) // BLOCK) * BLOCK
    yield from record(folder, [image.ljust(size, b"\0") for image in images])


def restored(state: StateId, found: Losses) -> StateId:
    """The state with what was lost put back."""
    seqs = {one.data.seq for one in found.ranges if one.data} | {one.seq for one in found.way}
    parts = tuple(RequestPart(seq) for seq in sorted(seqs))
    return StateId(state.position, state.level, Choice.ONLY, state.options, parts)


@pytest.mark.parametrize("case", ["plain", "logged", "below_qcow2"])
def test_what_is_lacking_put_back_makes_the_file_whole(
    request: pytest.FixtureRequest, case: str
) -> None:
    timeline, entries = request.getfixturevalue(case)
    finder = LossFinder(RecordingOwners(timeline, Tree()), Manifest(tuple(entries)))
    end = timeline.source.events
    told = set()
    for position in [*range(end - 30, end + 1), end // 2]:
        for level in LEVELS:
            state = StateId(position, level, Choice.MUST)
            for entry in entries:
                wanted = Manifest((entry,))
                if check(timeline.open(state), wanted).verdict is Verdict.PASS:
                    continue
                found = finder.losses(entry, state)
                if found is None:
                    continue
                assert found.ranges or found.way
                whole = timeline.open(restored(state, found))
                assert check(whole, wanted).verdict is Verdict.PASS, (str(state), entry.path)
                at = 0
                for one in found.ranges:
                    assert one.start == at
                    at = one.end
                    told.add("data" if one.data else "whole" if one.is_whole else "there")
                assert at == entry.size
                told |= {piece.what.partition(":")[0] for piece in found.way}
    assert {"data", "there"} <= told
    if case == "below_qcow2":
        assert "qcow2 L2 table" in told, told
    if case == "logged":
        assert any(what.startswith("journal, transaction ") for what in told), told


def test_what_never_was_whole_has_no_losses(plain: Opened) -> None:
    timeline, entries = plain
    state = StateId(1, Level.FLUSHED, Choice.MUST)
    finder = LossFinder(RecordingOwners(timeline, Tree()), Manifest(tuple(entries)))
    assert finder.losses(entries[0], state) is None

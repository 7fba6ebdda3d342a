"""Manifests of other programs through the commands."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Recorded
from tests.support.ext4 import FLUSHED, UNFLUSHED, content
from tests.support.serving import nbdproxy


def replayed(recorded: Recorded, manifest: Path) -> Any:
    words = ("replay", recorded.run, "--files", manifest, "--root", "/", "--list", "--json")
    return json.loads(nbdproxy(*words, code=1).stdout)


def dpkg(folder: Path) -> Path:
    """A list as dpkg has it of both files."""
    file = folder / "package.md5sums"
    names = (FLUSHED, UNFLUSHED)
    file.write_text("".join(f"{hashlib.md5(content(n)).hexdigest()}  {n}\n" for n in names))
    return file


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha512", "blake2b"])
def test_every_digest_gives_the_same_table(
    recorded: Recorded, tmp_path: Path, algorithm: str
) -> None:
    tag = {"blake2b": "BLAKE2b"}.get(algorithm, algorithm.upper())
    other = tmp_path / "other"
    other.write_text(
        "".join(
            f"{tag} (/{n}) = {hashlib.new(algorithm, content(n)).hexdigest()}\n"
            for n in (FLUSHED, UNFLUSHED)
        )
    )
    assert replayed(recorded, other) == replayed(recorded, recorded.manifest)


@pytest.mark.parametrize("algorithm", ["sha512", "blake2b"])
def test_as_many_digits_mean_either_where_nothing_names_them(
    recorded: Recorded, tmp_path: Path, algorithm: str
) -> None:
    """sha512sum and b2sum write the same: no file is damaged for being taken for the other's."""
    other = tmp_path / "other"
    lines = (
        f"{hashlib.new(algorithm, content(n)).hexdigest()}  /{n}\n" for n in (FLUSHED, UNFLUSHED)
    )
    other.write_text("".join(lines))
    assert replayed(recorded, other) == replayed(recorded, recorded.manifest)


def test_a_list_of_a_program_that_is_not_known_is_doubted(
    recorded: Recorded, tmp_path: Path
) -> None:
    """b3sum writes as many digits as sha256sum; where one file is whole, it was that."""
    other = tmp_path / "other"
    names = (FLUSHED, UNFLUSHED)
    digests = [hashlib.blake2s(content(name)).hexdigest() for name in names]
    other.write_text("".join(f"{d}  /{n}\n" for d, n in zip(digests, names, strict=True)))
    sentence = "made by another program than sha256sum, such as b3sum"
    assert sentence in replayed(recorded, other)["doubt"]
    words = ("--files", other, "--root", "/")
    assert sentence in nbdproxy("replay", recorded.run, *words, code=1).stdout
    assert sentence in nbdproxy("check", recorded.run, *words, code=1).stdout
    right = hashlib.sha256(content(FLUSHED)).hexdigest()
    other.write_text(f"{right}  /{FLUSHED}\n{digests[1]}  /{UNFLUSHED}\n")
    assert replayed(recorded, other)["doubt"] is None
    other.write_text("".join(f"SHA256 (/{n}) = {d}\n" for d, n in zip(digests, names, strict=True)))
    assert replayed(recorded, other)["doubt"] is None


def test_what_is_compared_by_md5_is_said(recorded: Recorded, tmp_path: Path) -> None:
    words = ("replay", recorded.run, "--files", dpkg(tmp_path))
    assert "2 files compared by md5" in nbdproxy(*words, code=1).stdout


def test_dpkgs_list_is_packed_with_its_paths(recorded: Recorded, tmp_path: Path) -> None:
    pack, run = tmp_path / "pack", tmp_path / "unpacked"
    nbdproxy("pack", recorded.run, "--files", dpkg(tmp_path), "-o", pack)
    nbdproxy("unpack", pack, "-o", run)
    packed = run / "files.sha256"
    assert f"MD5 (/{FLUSHED}) = " in packed.read_text()

"""The package as a library: what `import nbdproxy` gives, and what it costs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import nbdproxy
from nbdproxy import library
from tests.library.conftest import Prepared
from tests.support.nbd_client import NbdClient


def test_both_lists_of_what_is_public_are_the_same() -> None:
    assert set(nbdproxy.__all__) == {*library.__all__, "__version__"}
    assert set(nbdproxy.__all__) <= set(dir(nbdproxy))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        nbdproxy.nonsense  # noqa: B018 - asking is the test


def test_it_is_typed() -> None:
    spec = importlib.util.find_spec("nbdproxy")
    assert spec is not None and spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").exists()


def test_importing_it_imports_nothing_of_others() -> None:
    code = "import nbdproxy, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"numpy", "trio", "rich", "typer", "structlog"} & set(done.stdout.split())


def test_a_disk_is_served_as_long_as_the_block_runs(here: Prepared) -> None:
    with nbdproxy.serve("disk.img") as served:
        here.write_files(served.uri)
        folder = served.socket.parent
        assert "nbdproxy serves" in {thread.name for thread in threading.enumerate()}
    assert not folder.exists()
    assert "nbdproxy serves" not in {thread.name for thread in threading.enumerate()}
    assert Path("disk.img").read_bytes() == here.images[-1]


def test_a_cut_loses_what_was_not_flushed(here: Prepared) -> None:
    with nbdproxy.serve("disk.img", policy="drop-unflushed", socket="own.sock") as served:
        here.write_files(served.uri)
        assert Path("own.sock").exists()
        served.cut()
    assert served.is_off
    assert Path("disk.img").read_bytes() == here.images[1]
    served.cut("twice is harmless")


def test_what_is_wrong_is_said_on_entry(here: Prepared) -> None:
    for options, sentence in (
        ({"policy": "no-such"}, "there is no policy named no-such"),
        ({"read_only": True, "overlay": True}, "exclude each other"),
        ({"record": "run1"}, "run1"),
    ):
        with (
            pytest.raises(nbdproxy.NbdproxyError, match=sentence),
            nbdproxy.serve("disk.img", **options),
        ):
            raise AssertionError
    with pytest.raises(nbdproxy.NbdproxyError), nbdproxy.serve("nowhere.img"):
        raise AssertionError


def test_an_error_in_the_block_ends_the_serving(here: Prepared) -> None:
    with pytest.raises(ZeroDivisionError), nbdproxy.serve("disk.img", record="run2") as served:
        NbdClient(served.uri).write(0, bytes(512))
        raise ZeroDivisionError
    with nbdproxy.Case.open("run2") as case:
        assert case.source.ending is not None
        assert not case.source.is_damaged


def test_questions_of_one_recording_refuse_several(here: Prepared) -> None:
    case = nbdproxy.Case.open("run1", "run1", files="files.sha256")
    with case, pytest.raises(nbdproxy.NbdproxyError, match="one recording"):
        case.explain(["/flushed.bin"])
    with pytest.raises(nbdproxy.NbdproxyError, match="base"):
        nbdproxy.Case.open("run1", "run1", base="recorded.img")


def test_explain_needs_to_know_which_files(here: Prepared) -> None:
    case = nbdproxy.Case.open("run1")
    with case, pytest.raises(nbdproxy.NbdproxyError, match="which file"):
        case.explain()

"""nbdsh, libnbd's own shell: every command with every fault that libnbd lets through.

In strict mode libnbd refuses what is illegal before it is sent; with `set_strict_mode(0)` it sends
it, and the errno must be the specification's (doc/proto.md, "Error values"), with structured
replies and with simple ones, and afterwards the stream is in step.

Not covered: what libnbd cannot be made to send, such as a FLUSH with a length (`tests/nbd`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import shell
from tests.support.images import write_sparse
from tests.support.proxies import MIB, Proxy
from tests.support.serving import nbdproxy

SIZE = 4 * MIB
NAMES = """
import signal
END, BLOCK = 4 << 20, b"A" * 512
UNKNOWN = 1 << 9
"""


def nbdsh(*scripts: str) -> object:
    """Run code in nbdsh; return what it gave to `tell`."""
    return shell.nbdsh(NAMES, *scripts)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a hole, data, a hole."""
    data = b"-" * 65536
    return write_sparse(tmp_path / "image", data + bytes(MIB) + data + bytes(SIZE - MIB - 131072))


ILLEGAL: dict[str, tuple[str, str]] = {
    "read behind the end": ("h.pread(512, END)", "EINVAL"),
    "read over the end": ("h.pread(1024, END - 512)", "EINVAL"),
    "write behind the end": ("h.pwrite(BLOCK, END)", "ENOSPC"),
    "write over the end": ("h.pwrite(BLOCK * 2, END - 512)", "ENOSPC"),
    "trim over the end": ("h.trim(1024, END - 512)", "EINVAL"),
    "zero over the end": ("h.zero(1024, END - 512)", "ENOSPC"),
    "cache over the end": ("h.cache(1024, END - 512)", "EINVAL"),
    "read far behind the end": ("h.pread(512, (1 << 63) - 512)", "EINVAL"),
    "empty trim": ("h.trim(0, 0)", "EINVAL"),
    "empty zero": ("h.zero(0, 0)", "EINVAL"),
    "empty cache": ("h.cache(0, 0)", "EINVAL"),
    "unknown flag of read": ("h.pread(512, 0, UNKNOWN)", "EINVAL"),
    "unknown flag of write": ("h.pwrite(BLOCK, 0, UNKNOWN)", "EINVAL"),
    "unknown flag of flush": ("h.flush(UNKNOWN)", "EINVAL"),
    "unknown flag of trim": ("h.trim(512, 0, UNKNOWN)", "EINVAL"),
    "unknown flag of zero": ("h.zero(512, 0, UNKNOWN)", "EINVAL"),
    "unknown flag of cache": ("h.cache(512, 0, UNKNOWN)", "EINVAL"),
    "DF on a write": ("h.pwrite(BLOCK, 0, nbd.CMD_FLAG_DF)", "EINVAL"),
    "NO_HOLE on a trim": ("h.trim(512, 0, nbd.CMD_FLAG_NO_HOLE)", "EINVAL"),
    "FAST_ZERO on a write": ("h.pwrite(BLOCK, 0, nbd.CMD_FLAG_FAST_ZERO)", "EINVAL"),
    "REQ_ONE on a flush": ("h.flush(nbd.CMD_FLAG_REQ_ONE)", "EINVAL"),
    "status without a context": ("h.block_status(65536, 0, lambda *_: 0)", "EINVAL"),
}

LEGAL: dict[str, str] = {
    "any bytes read": "h.pread(511, 1)",
    "any bytes written": "h.pwrite(b'A', 255)",
    "any bytes trimmed": "h.trim(1000, 1)",
    "any bytes zeroed": "h.zero(512, 100)",
    "any bytes cached": "h.cache(10, 3)",
    "FUA on a write": "h.pwrite(BLOCK, 0, nbd.CMD_FLAG_FUA)",
    "FUA on a trim": "h.trim(512, 0, nbd.CMD_FLAG_FUA)",
    "FUA on a zero": "h.zero(512, 0, nbd.CMD_FLAG_FUA)",
    "NO_HOLE": "h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE)",
    "cache": "h.cache(END, 0)",
    "the last block": "h.pwrite(BLOCK, END - 512)",
    "all of it": "h.trim(END, 0)",
}
ODD = {
    "FUA on a flush": "h.flush(nbd.CMD_FLAG_FUA)",
    "FUA on a read": "h.pread(512, 0, nbd.CMD_FLAG_FUA)",
}
"""Legal, for FUA is so on every command, but libnbd thinks better of it when it is strict."""


def connect(uri: str, *, structured: bool, strict: bool = False) -> str:
    """The script that connects."""
    return f"""
    h.set_request_structured_replies({structured})
    h.connect_uri({uri!r})
    {"" if strict else "h.set_strict_mode(0)"}
    """


def outcomes(calls: dict[str, str]) -> str:
    """The script that tries these calls."""
    pairs = ", ".join(f"{name!r}: outcome(lambda: {call})" for name, call in calls.items())
    return f"tell({{{pairs}, 'in step': outcome(lambda: h.pread(512, 0))}})"


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_what_is_illegal_gets_the_specifications_errno(
    image: Path, tmp_path: Path, structured: bool
) -> None:
    before = image.read_bytes()
    with Proxy(tmp_path / "proxy", image, "--record", tmp_path / "run") as proxy:
        calls = {name: call for name, (call, _) in ILLEGAL.items()}
        told = nbdsh(connect(proxy.uri, structured=structured), outcomes(calls))
        expected = {name: error for name, (_, error) in ILLEGAL.items()}
        assert told == {**expected, "in step": None}
        assert proxy.stop() == 0
    assert image.read_bytes() == before
    facts = json.loads(nbdproxy("info", tmp_path / "run", "--json").stdout)
    assert facts["refused"] == len(ILLEGAL)
    assert not facts["requests"]


def test_strict_libnbd_sends_nothing_that_is_illegal(image: Path, tmp_path: Path) -> None:
    """It knows from what we told it, so we told it all."""
    with Proxy(tmp_path / "proxy", image, "--record", tmp_path / "run") as proxy:
        calls = {name: call for name, (call, _) in ILLEGAL.items()}
        # What libnbd does not look at even when it is strict: alignment, by default.
        strict = "h.set_strict_mode(h.get_strict_mode() | nbd.STRICT_ALIGN)"
        script = connect(proxy.uri, structured=True, strict=True)
        told = nbdsh(script, strict, outcomes(calls))
        assert isinstance(told, dict)
        assert [name for name, error in told.items() if error is None] == ["in step"]
        assert proxy.stop() == 0
    facts = json.loads(nbdproxy("info", tmp_path / "run", "--json").stdout)
    assert facts["refused"] == 0


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_what_is_legal_succeeds(
    image: Path, tmp_path: Path, structured: bool, strict: bool
) -> None:
    with Proxy(tmp_path / "proxy", image) as proxy:
        calls = LEGAL if strict else LEGAL | ODD
        told = nbdsh(connect(proxy.uri, structured=structured, strict=strict), outcomes(calls))
        assert told == {**dict.fromkeys(calls), "in step": None}
    assert image.read_bytes() == bytes(SIZE)


def test_fast_zeroes_are_fast_or_refused_as_such(image: Path, tmp_path: Path) -> None:
    with Proxy(tmp_path / "proxy", image) as proxy:
        script = """
        assert h.can_fast_zero()
        tell(outcome(lambda: h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)))
        """
        told = nbdsh(connect(proxy.uri, structured=True), script)
    assert told in {None, "ENOTSUP"}
    assert image.read_bytes()[:65536] == (bytes(65536) if told is None else b"-" * 65536)


def test_df_is_one_chunk_and_needs_structured_replies(image: Path, tmp_path: Path) -> None:
    """Without DF a read over a hole has several chunks; DF is an error where it was not offered."""
    script = """
    def chunks(flags):
        found = []
        def chunk(data, offset, status, error):
            found.append([offset, len(data), status])
        h.pread_structured(131072, 0, chunk, flags)
        return found
    tell([h.can_df(), chunks(0), chunks(nbd.CMD_FLAG_DF)])
    """
    with Proxy(tmp_path / "proxy", image) as proxy:
        assert nbdsh(connect(proxy.uri, structured=True), script) == [
            *(True, [[0, 65536, 1], [65536, 65536, 2]], [[0, 131072, 1]]),
        ]
        lax = connect(proxy.uri, structured=False)
        df = outcomes({"DF": "h.pread(512, 0, nbd.CMD_FLAG_DF)"})
        assert nbdsh(lax, df) == {"DF": "EINVAL", "in step": None}


STATUS = """
h.set_strict_mode(0)
def status(length, offset, flags=0):
    found = []
    def extents(context, start, entries, error):
        assert (context, start) == ("base:allocation", offset)
        found.extend(entries)
    h.block_status(length, offset, extents, flags)
    return found
"""


def test_status_tells_the_holes(image: Path, tmp_path: Path) -> None:
    script = """
    tell({
        "contexts": h.can_meta_context("base:allocation"),
        "all": status(END, 0),
        "one": status(END, 0, nbd.CMD_FLAG_REQ_ONE),
        "part": status(512, 65536),
        "behind": outcome(lambda: status(1024, END - 512)),
        "any byte": outcome(lambda: status(512, 1)),
        "empty": outcome(lambda: status(0, 0)),
        "unknown flag": outcome(lambda: status(512, 0, UNKNOWN)),
        "DF": outcome(lambda: status(512, 0, nbd.CMD_FLAG_DF)),
        "in step": status(512, 0),
    })
    """
    with Proxy(tmp_path / "proxy", image) as proxy:
        wish = f"h.add_meta_context('base:allocation')\nh.connect_uri({proxy.uri!r})"
        told = nbdsh(wish, STATUS, script)
    assert told == {
        "contexts": True,
        "all": [65536, 0, MIB, 3, 65536, 0, SIZE - MIB - 131072, 3],
        "one": [65536, 0],
        "part": [512, 3],
        "any byte": None,
        **dict.fromkeys(("behind", "empty", "unknown flag", "DF"), "EINVAL"),
        "in step": [512, 0],
    }


def test_a_read_only_export_refuses_changes_with_eperm(image: Path, tmp_path: Path) -> None:
    calls = {
        "write": "h.pwrite(BLOCK, 0)",
        "trim": "h.trim(512, 0)",
        "zero": "h.zero(512, 0)",
        "write over the end": "h.pwrite(BLOCK * 2, END - 512)",
    }
    with Proxy(tmp_path / "proxy", image, "--read-only") as proxy:
        told = nbdsh(connect(proxy.uri, structured=True), outcomes(calls))
        assert told == {**dict.fromkeys(calls, "EPERM"), "in step": None}


def test_a_request_that_is_too_large_costs_at_most_its_connection(
    image: Path, tmp_path: Path
) -> None:
    """33 MiB: the read is told so, the write's payload is not worth being read."""
    script = """
    h.set_strict_mode(0)
    told = [outcome(lambda: h.pread(33 << 20, 0)), outcome(lambda: h.pread(512, 0))]
    told.append(outcome(lambda: h.pwrite(bytes(33 << 20), 0)) is not None)
    other = nbd.NBD()
    other.connect_uri(h.get_uri())
    tell([*told, len(other.pread(512, 0))])
    """
    with Proxy(tmp_path / "proxy", image) as proxy:
        for structured, error in ((True, "EOVERFLOW"), (False, "EINVAL")):
            told = nbdsh(connect(proxy.uri, structured=structured), script)
            assert told == [error, None, True, 512]


def test_a_flush_covers_what_another_connection_wrote(image: Path, tmp_path: Path) -> None:
    """CAN_MULTI_CONN. The server is killed in the end, which is a power cut under this policy."""
    before = image.read_bytes()
    options = ("--policy", "drop-unflushed", "--record", tmp_path / "run")
    with Proxy(tmp_path / "proxy", image, *options) as proxy:
        script = f"""
        first, second, third = nbd.NBD(), nbd.NBD(), nbd.NBD()
        for one in (first, second, third):
            one.connect_uri({proxy.uri!r})
            assert one.can_multi_conn()
        first.pwrite(b"1" * 4096, 0)
        second.zero(4096, 4096)
        first.trim(4096, 8192)
        assert third.pread(8192, 0) == b"1" * 4096 + bytes(4096)
        third.flush()
        second.pwrite(b"2" * 4096, 16384)
        third.pwrite(b"3" * 512, 32768, nbd.CMD_FLAG_FUA)
        os.kill({proxy.pid}, signal.SIGKILL)
        tell("done")
        """
        assert nbdsh(script) == "done"
        proxy.wait()
    expected = bytearray(before)
    expected[:12288] = b"1" * 4096 + bytes(8192)
    expected[32768:33280] = b"3" * 512
    assert image.read_bytes() == expected

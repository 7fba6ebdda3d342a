"""Programs that exercise disks, against nbdproxy and through its recording.

fio checks what it reads back itself; a client over libnbd keeps a shadow copy, as fsx does (whose
source Debian does not package): random requests of any bytes, each read compared. What is left is
compared with the image and with what the recording gives. And QEMU goes on over a server that was
killed, into a second recording. A failing run prints its seed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support import shell
from tests.support.proxies import MIB, Proxy
from tests.support.qemu import Qemu
from tests.support.recordings import state
from tests.support.serving import tool

SIZE = 3 * MIB + 12_345
"""No multiple of anything."""

SHADOW = """
import random
dice = random.Random({seed})
h = nbd.NBD()
h.connect_uri({uri!r})
size = h.get_size()
shadow = bytearray(h.pread(size, 0))
for number in range({count}):
    length = dice.choice((1, 3, 511, 512, 513, 4096, 5000, 70000))
    offset = dice.randrange(size - length + 1)
    end = offset + length
    what = dice.choice(("write", "write", "read", "zero", "trim", "flush"))
    fua = nbd.CMD_FLAG_FUA if dice.random() < 0.1 else 0
    if what == "write":
        shadow[offset:end] = dice.randbytes(length)
        h.pwrite(bytes(shadow[offset:end]), offset, flags=fua)
    elif what == "zero":
        shadow[offset:end] = bytes(length)
        h.zero(length, offset, flags=fua)
    elif what == "trim":
        shadow[offset:end] = bytes(length)
        h.trim(length, offset, flags=fua)
    elif what == "flush":
        h.flush()
    assert h.pread(length, offset) == shadow[offset:end], ({seed}, number, what, offset, length)
assert h.pread(size, 0) == shadow, {seed}
open({out!r}, "wb").write(shadow)
h.shutdown()
tell("done")
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of an odd size with data in it."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


@pytest.mark.parametrize("policy", ["passthrough", "reordering-cache"])
def test_random_requests_of_any_bytes_with_a_shadow_copy(
    image: Path, tmp_path: Path, policy: str
) -> None:
    seed = random.randrange(1 << 32)
    run, shadow, base = tmp_path / "run", tmp_path / "shadow", tmp_path / "base"
    base.write_bytes(image.read_bytes())
    with Proxy(tmp_path / "proxy", image, "--policy", policy, "--record", run) as proxy:
        script = SHADOW.format(seed=seed, uri=proxy.uri, count=800, out=str(shadow))
        assert shell.nbdsh(script) == "done"
        assert proxy.stop() == 0
    assert state(run, base) == shadow.read_bytes(), f"seed {seed}"
    if policy == "passthrough":
        assert image.read_bytes() == shadow.read_bytes()


def test_fio_verifies_what_it_wrote_at_any_byte(image: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    base.write_bytes(image.read_bytes())
    with Proxy(tmp_path / "proxy", image, "--record", run) as proxy:
        tool(
            *("fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={proxy.socket}"),
            # Not --bs_unaligned: fio 3.39 refuses it together with --verify.
            *("--rw=randwrite", "--bs=5500", "--verify_interval=1100", "--iodepth=16"),
            *("--io_size=8M", "--size=3M", "--verify=crc32c", "--fsync=64", "--randseed=5"),
            "--verify_state_save=0",
        )
        assert proxy.stop() == 0
    assert image.read_bytes() != base.read_bytes()
    assert state(run, base) == image.read_bytes()


def test_qemu_goes_on_over_a_killed_server_into_a_second_recording(
    image: Path, tmp_path: Path
) -> None:
    base, first, second = tmp_path / "base", tmp_path / "run1", tmp_path / "run2"
    base.write_bytes(image.read_bytes())
    with (
        Proxy(tmp_path / "proxy", image, "--record", first) as killed,
        Qemu(tmp_path, killed.socket, reconnect_s=30) as qemu,
    ):
        qemu.io("write -P 65 0 64k")
        qemu.io("flush")
        qemu.io("write -P 66 64k 64k")
        killed.kill()
        between = image.read_bytes()
        with Proxy(tmp_path / "proxy", image, "--record", second) as restarted:
            qemu.io("write -P 67 128k 64k")
            qemu.io("flush")
            qemu.io("read -P 66 64k 64k")
            assert qemu.quit() == 0
            assert restarted.stop() == 0
    expected = bytearray(base.read_bytes())
    expected[:131072] = b"A" * 65536 + b"B" * 65536
    assert between == expected
    assert state(first, base) == between
    expected[131072:196608] = b"C" * 65536
    assert image.read_bytes() == expected
    (tmp_path / "between").write_bytes(between)
    assert state(second, tmp_path / "between") == expected

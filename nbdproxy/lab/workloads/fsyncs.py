"""An application that asks what fsync says: a workload's script, and a reader of what it prints.

Through one file descriptor that stays open, it writes, calls fsync, calls it again with nothing
new, writes again, and so on; then it reads the file, from the page cache and from the disk. It goes
on whatever fails: on a disk whose flushes fail, that is what there is to see.

Guarantees: every write is 16 KiB at the file's beginning and names its attempt, so that only the
first one allocates anything, and reading tells which write is there.
Does not cover O_DIRECT, O_SYNC, and several descriptors of one file.
"""

from __future__ import annotations

import re

from nbdproxy.errors import LabError
from nbdproxy.lab.workloads.kernel_log import HUSH, TELL

CALLS = ("fsync", "fdatasync")

_SCRIPT = r"""
const fs = require("fs"), size = 16384;
const content = (i) => Buffer.alloc(size, `write ${i}\n`.padStart(16));
const say = (what, act) => {
  let result;
  try { result = act() } catch (error) { result = error.code }
  fs.writeSync(1, `${what}: ${result}\n`);
  return result;
};
const holds = () => {
  const found = Buffer.alloc(size), count = fs.readSync(fd, found, 0, size, 0);
  for (let i = 1; i <= attempts; i++) {
    if (count == size && found.equals(content(i))) return `write ${i}`;
  }
  return count == 0 ? "nothing" : "mixed";
};
let fd;
const act = (doing) => () => { doing(); return "ok" };
if (say("open", act(() => { fd = fs.openSync("probe", "w+") })) == "ok") {
  for (let i = 1; i <= attempts; i++) {
    if (i % 2) say(`write ${i}`, act(() => fs.writeSync(fd, content(i), 0, size, 0)));
    say(`${call} ${i}`, act(() => fs[`${call}Sync`](fd)));
  }
  say("cached", holds);
  fs.writeFileSync("/proc/sys/vm/drop_caches", "3");
  say("stored", holds);
  say("close", act(() => fs.closeSync(fd)));
}
"""

_SAID = re.compile(
    rf"^(open|(?:write|{'|'.join(CALLS)}) \d+|cached|stored|close): (.*?)\r?$", re.MULTILINE
)


def probe_script(*, call: str, attempts: int) -> str:
    """Return the shell script; every other attempt, from the first, writes before its call.

    It prints, line by line, an error as the kernel names it, say EIO or EROFS:

        open: ok|ERROR
        write I: ok|ERROR    for I of 1, 3, 5, ...
        fsync I: ok|ERROR    for I of 1, 2, 3, ...; or fdatasync, if that is the call
        cached: write I|nothing|mixed|ERROR    what the file holds, as the guest sees it
        stored: write I|nothing|mixed|ERROR    the same with the page cache dropped
        close: ok|ERROR
        kernel: TEXT         the kernel's errors
    """
    if call not in CALLS:
        raise LabError(f"no call {call!r}; choose from {', '.join(CALLS)}")
    return (
        f"{HUSH}\n/tools/bin/node - << 'END'\n"
        f'const call = "{call}", attempts = {attempts};{_SCRIPT}END\n'
        f"status=$?\n{TELL}\nexit $status\n"
    )


def probed(serial: str) -> dict[str, str]:
    """Return what each step said: `{"open": "ok", "write 1": "ok", "fsync 1": "EIO", ...}`."""
    return dict(_SAID.findall(serial))

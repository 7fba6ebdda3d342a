"""Files replaced by rename without fsync: the script, and what the files hold before and after.

The oldest way to lose a file: write a new version beside it, rename it over the old one, never ask
for the data. ext4 allocates late, so its journal commits the rename and the new file's length of 0
while the data waits in the page cache for up to 30 s. The mount option `auto_da_alloc`, the
default, sends the data with the rename's commit; `noauto_da_alloc` does not.

Guarantees: the old versions are synced before the new ones are written; the script prints
`mark old-synced` then and `mark new-renamed` behind the last rename. Every content follows from the
file's number and is several blocks long.

Does not cover other filesystems, and applications that do sync: see `databases`.
"""

from __future__ import annotations

import hashlib

from nbdproxy.lab.workloads.kernel_log import HUSH
from nbdproxy.oracles.manifest import Entry, Manifest

FILES = 20
"""How many files there are, `/file-1` and so on."""

_LINES = 400  # some 9 kB: too long to be stored in the inode


def script(files: int = FILES) -> str:
    """Return the shell script; its working directory is the top of the target disk."""
    return f"""{HUSH}
for i in $(seq {files}); do yes "old content of file $i" | head -n {_LINES} > file-$i; done
sync
echo mark old-synced
for i in $(seq {files}); do
  yes "new content of file $i" | head -n {_LINES} > file-$i.new
  mv -f file-$i.new file-$i || exit
done
echo mark new-renamed
"""


def new_manifest(files: int = FILES) -> Manifest:
    """Return the files as the application meant them to be."""
    return _manifest("new", files)


def old_manifest(files: int = FILES) -> Manifest:
    """Return the files as they were before; it may be any mix of both, and nothing else."""
    return _manifest("old", files)


def _manifest(version: str, files: int) -> Manifest:
    entries = []
    for number in range(1, files + 1):
        data = f"{version} content of file {number}\n".encode() * _LINES
        entries.append(Entry(f"/file-{number}", hashlib.sha256(data).hexdigest(), len(data)))
    return Manifest(tuple(entries))

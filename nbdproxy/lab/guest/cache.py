"""The lab's cache: parts that are built once and found again by what they are made of.

A part is a directory `NAME-KEY`. Guarantees: a part is there whole or not at all (it is built
aside and renamed), a part whose ingredients changed gets another key and is built anew, and two
builders at once do not build the same part twice. Nothing is ever deleted: parts of other
ingredients stay, and removing the whole cache directory is always safe while no guest runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbdproxy.errors import LabError, UnsafeFolderError
from nbdproxy.private import open_folder

LabProgress = Callable[[str], None]
"""Is told what is being done, one line at a time."""


def silent(_line: str) -> None:
    """Report no progress."""


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/nbdproxy/lab`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nbdproxy" / "lab"


def key_of(*ingredients: bytes | str) -> str:
    """Return a short key for what something is made of; the order counts."""
    digest = hashlib.sha256()
    for ingredient in ingredients:
        data = ingredient.encode() if isinstance(ingredient, str) else ingredient
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:16]


def identity_of(path: Path) -> str:
    """Return what tells that a big file has changed, without reading it."""
    real = path.resolve()
    status = real.stat()
    return f"{real} {status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class LabCache:
    """A cache directory, and who is told what is built in it."""

    root: Path
    progress: LabProgress = silent

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other builders out; they wait."""
        try:
            os.close(open_folder(self.root, sticky=False, make=True))
            handle = (self.root / "lock").open("w")
        except UnsafeFolderError as error:
            raise LabError(f"{error}, with XDG_CACHE_HOME") from None
        except OSError as error:
            raise LabError(
                f"the lab's cache {self.root} cannot be written ({error.strerror}); "
                "set XDG_CACHE_HOME to a directory that can"
            ) from None
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def part(self, name: str, key: str, make: Callable[[Path], None], telling: str) -> Path:
        """Return the directory of a part, filled by `make` if it is not there yet."""
        final = self.root / f"{name}-{key}"
        if final.is_dir():
            return final
        self.progress(telling)
        aside = Path(tempfile.mkdtemp(prefix=f"building-{name}-", dir=self.root))
        try:
            make(aside)
            aside.chmod(0o755)
            aside.rename(final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return final

"""What a re-enactment leaves: recordings of the files below, and which of their cuts are meant.

A folder with a recording for each file that the driver writes, `file` and perhaps `data-file`, and
beside them `cuts.npz` and `about.json`, which come last: without them it is not whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nbdproxy.crash.states.recorded import BaseDisk, RecordedSource
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import RecordingError
from nbdproxy.persistence.modes import CacheMode
from nbdproxy.recording.index import Mask

_CUTS, _ABOUT = "cuts.npz", "about.json"


class FileSource(RecordedSource):
    """The recording of a file below, whose crash states are files that QEMU would have left.

    `image` is that file as it was at the start. The recorded one is larger: it had room to grow,
    and what was never written there reads as zeroes.
    """

    def __init__(self, path: Path, image: Path) -> None:
        super().__init__(path, image=image)

    def base(self) -> ReadableDevice:
        """Open the file as it was at the start; raises ImageError if it is not there."""
        return BaseDisk(self, FileDisk(self.image, read_only=True))


@dataclass(frozen=True, slots=True, eq=False)
class Reenacted:
    """A re-enactment for one cache mode.

    folder     where it is
    mode       for which it was played
    qemu       whose driver it was, as that calls itself
    remark     what may have been otherwise when it was recorded, in words; empty if nothing
    files      the names of the node's children that were written, which their recordings have too
    positions  for each cut of the recording above, from 0 to its end, the cut of each file's
               recording: a row a cut, a column a file
    exact      for each of these cuts, whether all that had been sent by then was answered in the
               recording above; else the files hold some of what was in flight there
    """

    folder: Path
    mode: CacheMode
    qemu: str
    remark: str
    files: tuple[str, ...]
    positions: NDArray[np.int64]
    exact: Mask

    def recording(self, name: str) -> Path:
        """Return the folder of a file's recording."""
        return self.folder / name

    def save(self) -> None:
        """Write all but the recordings to the folder."""
        np.savez(self.folder / _CUTS, positions=self.positions, exact=self.exact)
        about = {
            "mode": self.mode.value,
            "qemu": self.qemu,
            "remark": self.remark,
            "files": self.files,
        }
        (self.folder / _ABOUT).write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what was saved; raises RecordingError if it is not whole."""
        try:
            about = json.loads((folder / _ABOUT).read_text())
            with np.load(folder / _CUTS) as arrays:
                return cls(
                    folder,
                    CacheMode(about["mode"]),
                    about["qemu"],
                    about["remark"],
                    tuple(about["files"]),
                    arrays["positions"],
                    arrays["exact"],
                )
        except (OSError, ValueError, KeyError) as error:
            raise RecordingError(
                f"{folder} is no whole re-enactment ({error}); remove it, and play again"
            ) from None

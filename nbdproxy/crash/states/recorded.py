"""A recording as a `Source`: the reader, and the disk as it was when the recording began.

That disk is put together from three places: what was saved before it was changed, zeroes where
the image had holes at the start, and the image itself for data that the recording never changed.
Only the last needs the image, unchanged since; if it was changed by others, the answer is an
ImageError and not a wrong state. An unpacked recording brings its own part of the image.

A recording from elsewhere may name any file as its image. Only one that was made here and is no
copy is believed; of all others nothing outside their folder is read, unless the user names it.

Not covered: a killed recorder, and an image that was changed by others within a minute after; an
image that the user names as unchanged; and an unpacked recording whose `base` was written to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nbdproxy.crash.states.paint import Painting
from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import ImageError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.recording.format import base_path, data_path, events_path, index_path
from nbdproxy.recording.index import BASE
from nbdproxy.recording.meta import Fingerprint
from nbdproxy.recording.packed import STREAMS, load_index
from nbdproxy.recording.reader import Recording

_LAZY_NS = 60 * 10**9
"""How much older a killed recording's files may look than the last write of its image: the time of
change of a mapped file is told late."""


def is_recording(path: Path) -> bool:
    """Tell whether a folder holds a recording."""
    return events_path(path).is_file() and data_path(path).is_file()


class RecordedSource(Recording):
    """A recording whose crash states can be rebuilt.

    `image` is where the image is now, if it was moved or if an unchanged copy shall be used.
    """

    def __init__(self, path: Path, *, image: Path | None = None) -> None:
        super().__init__(path)
        if image is not None and not image.exists():
            raise ImageError(f"there is no image at {image}; name it as it was with --base")
        self._image_given = image
        saved = self.befores
        # Painted from the last to the first, so that the first shows.
        rows = np.arange(len(saved), dtype=np.int32)
        self._painting = Painting(saved.offset[::-1], saved.length[::-1], rows)

    def saved_segments(self, start: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """Yield all of [start, end) with where it was saved in the data stream.

        -1 means that it was saved as zeroes, None that it was never saved.
        """
        saved = self.befores
        for low, high, painted in self._painting.segments(start, end):
            if painted == BASE:
                yield low, high, None
                continue
            row = len(saved) - 1 - painted
            position = int(saved.position[row])
            yield low, high, position if position < 0 else position + low - int(saved.offset[row])

    @property
    def offers_fua(self) -> bool | None:
        """Whether a client could send FUA; None if that is not known."""
        return self.meta.offers_fua

    @property
    def above_qcow2(self) -> bool:
        """Whether the disk is what a guest sees of a qcow2 file, whose driver is below."""
        return self.meta.kind == "qcow2"

    @property
    def image(self) -> Path:
        """Where the image is looked for."""
        if self._image_given is not None:
            return self._image_given
        return base_path(self.path) if self._is_unpacked else Path(self.meta.image)

    @property
    def _is_unpacked(self) -> bool:
        return any(os.path.lexists(of(self.path)) for of in (base_path, index_path))

    def image_parts(self) -> Iterator[Extent]:
        """Yield, ascending and disjoint, the parts of the disk that are in the image only."""
        for extent in self.image_data():
            for low, high, position in self.saved_segments(extent.offset, extent.end):
                if position is None:
                    yield Extent.between(low, high)

    def image_data(self) -> ExtentSet:
        """Return what was no hole in the image at the start."""
        return ExtentSet(Extent(*part) for part in self.meta.data)

    @property
    def needs_image(self) -> bool:
        """Whether a part of the disk is in the image only."""
        return any(True for _ in self.image_parts())

    def base(self) -> ReadableDevice:
        """Open the disk as it was at the start; raises ImageError if the image went on since.

        Raises RecordingError for an unpacked recording without its index.
        """
        image = None
        if self.needs_image:
            own = self._image_given is None and self._is_unpacked
            if own:
                self._check_whole()
            elif self._image_given is None:
                self._check_raw()
                self._check_original()
                self._check_unchanged()
            image = FileDisk(self.image, read_only=True, links=not own)
            if image.size != self.size:
                image.close()
                raise ImageError(
                    f"{self.image} has {image.size} bytes, and the disk that was recorded "
                    f"{self.size}; name the right image with --base IMAGE"
                )
        return BaseDisk(self, image)

    def _check_whole(self) -> None:
        """Refuse a base that is lacking, or not what was packed, or that lacks before-images."""
        own = base_path(self.path)
        if own.is_symlink() or not own.is_file():
            raise ImageError(
                f"{self.path} was unpacked, and lacks the file {own.name} with what it needs of "
                "its image; unpack it again, or name its image with --base IMAGE"
            )
        if self.events < load_index(self.path).events:
            raise ImageError(
                f"the end of {self.path} was lost after it was unpacked, and with it a part of the "
                "disk as it was; unpack it again, or name its image with --base IMAGE"
            )

    def _check_raw(self) -> None:
        """Refuse an image whose bytes are not the disk's."""
        kind = self.meta.kind
        if kind != "raw":
            copy = (
                f"nbdcopy '{self.meta.image}' base.img"
                if kind == "nbd"
                else f"qemu-img convert -f {kind} -O raw {self.meta.image} base.img"
            )
            raise ImageError(
                f"this recording builds on {self.meta.image}, which is no raw image; if nothing "
                f"else wrote to it since, copy it with: {copy}; then add --base base.img"
            )

    def _check_original(self) -> None:
        """Refuse to read what a recording names that may be anybody's."""
        image = self.meta.image
        if not self.is_original:
            raise ImageError(
                f"{self.path} is a copy, or comes from elsewhere, and says that it builds on "
                f"{image}; if that is so, and nothing wrote to it since, add --base {image}"
            )

    def _check_unchanged(self) -> None:
        image = Path(self.meta.image)
        if self.truncated and not self.meta.overlay:
            raise ImageError(
                f"the end of {self.path} is lost, and with it what {image} held before it was "
                "changed; name a copy from before the recording with --base IMAGE"
            )
        then = self.meta.base if self.meta.overlay or self.ending is None else self.ending.image
        try:
            now = Fingerprint.of(image)
        except OSError:
            raise ImageError(
                f"{image}, which this recording builds on, is not there any more; "
                "name it with --base IMAGE"
            ) from None
        if image.is_block_device() or then is None:
            raise ImageError(
                f"it cannot be told whether {image} was changed since; if nothing else wrote to "
                f"it, name it with --base {image}"
            )
        if self.ending is None and not self.meta.overlay:
            # A killed recorder could not say what it left: the recording is as old as its files.
            changed = now.mtime_ns > self._last_change_ns() + _LAZY_NS
            changed |= now.size != self.meta.base.size
        else:
            changed = now != then
        if changed:
            raise ImageError(
                f"{image} was changed after the recording ended, so its crash states cannot be "
                "rebuilt; name a copy from before that with --base IMAGE"
            )

    def _last_change_ns(self) -> int:
        # Other files may have come into the folder since.
        streams = [self.path / name for name in STREAMS]
        return max(file.stat().st_mtime_ns for file in streams if file.exists())


class BaseDisk:
    """The disk as it was when the recording began, as a `ReadableDevice`.

    `image` holds what was never changed; it is closed with the disk if it is `owned` by it.
    """

    def __init__(
        self, recording: RecordedSource, image: ReadableDevice | None, *, owned: bool = True
    ) -> None:
        self.size = recording.size
        self._recording = recording
        self._image = image
        self._owned = owned
        self._data = recording.image_data()

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        end = offset + len(buffer)
        for start, stop, position in self._recording.saved_segments(offset, end):
            piece = buffer[start - offset : stop - offset]
            if position is not None and position >= 0:
                self._recording.read_payload(position, piece)
                continue
            piece[:] = bytes(len(piece))
            if position is None and self._image is not None:
                for part in self._data.overlapping(start, stop):
                    self._image.pread_into(
                        part.offset, piece[part.offset - start : part.end - start]
                    )

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what was not a hole, and not saved as zeroes."""
        found = ExtentSet()
        for start, stop, position in self._recording.saved_segments(offset, offset + length):
            if position is None:
                for part in self._data.overlapping(start, stop):
                    found.add(part.offset, part.end)
            elif position >= 0:
                found.add(start, stop)
        return iter(found)

    def close(self) -> None:
        """Close the image, if it is owned."""
        if self._image is not None and self._owned:
            self._image.close()

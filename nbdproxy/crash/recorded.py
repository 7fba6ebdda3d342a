"""A recording as a `Source`: the reader, and the disk as it was when the recording began.

That disk is put together from three places: what was saved before it was changed, zeroes where
the image had holes at the start, and the image itself for data that the recording never changed.
Only the last needs the image, unchanged since; if it was changed by others, the answer is an
ImageError and never a wrong state.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.disks.file import FileDisk
from nbdproxy.errors import ImageError
from nbdproxy.extents import Extent, ExtentMap, ExtentSet
from nbdproxy.recording.meta import Fingerprint
from nbdproxy.recording.reader import Recording

_ZERO = -1


class RecordedSource(Recording):
    """A recording whose crash states can be rebuilt.

    `image` is where the image is now, if it was moved or if an unchanged copy shall be used.
    """

    def __init__(self, path: Path, *, image: Path | None = None) -> None:
        super().__init__(path)
        self._image_given = image
        self._saved = ExtentMap[int](lambda position, n: position if position < 0 else position + n)
        for before in self.befores:
            end = before.offset + before.length
            self._saved.set(before.offset, end, before.position)
        self._unsaved = ExtentSet()
        for start, length in self.meta.data:
            for low, high, position in self._saved.segments(start, start + length):
                if position is None:
                    self._unsaved.add(low, high)

    @property
    def image(self) -> Path:
        """Where the image is looked for."""
        return self._image_given or Path(self.meta.image)

    @property
    def needs_image(self) -> bool:
        """Whether a part of the disk is in the image only."""
        return len(self._unsaved) > 0

    def base(self) -> ReadableDevice:
        """Open the disk as it was at the start; raises ImageError if the image went on since."""
        image = None
        if self.needs_image:
            if self._image_given is None:
                self._check_unchanged()
            image = FileDisk(self.image, read_only=True)
            if image.size != self.size:
                image.close()
                raise ImageError(
                    f"{self.image} has {image.size} bytes, and the disk that was recorded "
                    f"{self.size}; name the right image with --base IMAGE"
                )
        return BaseDisk(self, self._saved, self._unsaved, image)

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
        if then is None or (self.ending is None and not self.meta.overlay):
            # A killed recorder could not say what it left; only the size can be compared.
            if now.size != self.meta.base.size:
                raise ImageError(f"{image} has another size than when it was recorded")
            return
        if now != then:
            raise ImageError(
                f"{image} was changed after the recording ended, so its crash states cannot be "
                "rebuilt; name a copy from before that with --base IMAGE"
            )


class BaseDisk:
    """The disk as it was when the recording began, as a `ReadableDevice`."""

    def __init__(
        self,
        recording: Recording,
        saved: ExtentMap[int],
        unsaved: ExtentSet,
        image: FileDisk | None,
    ) -> None:
        self.size = recording.size
        self._recording = recording
        self._saved = saved
        self._unsaved = unsaved
        self._image = image

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        end = offset + len(buffer)
        for start, stop, position in self._saved.segments(offset, end):
            piece = buffer[start - offset : stop - offset]
            if position is not None and position != _ZERO:
                self._recording.read_payload(position, piece)
                continue
            piece[:] = bytes(len(piece))
            if position is None and self._image is not None:
                for part in self._unsaved.overlapping(start, stop):
                    self._image.pread_into(
                        part.offset, piece[part.offset - start : part.end - start]
                    )

    def data_extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what was not a hole, or was saved with content."""
        found = ExtentSet()
        for start, stop, position in self._saved.overlapping(offset, offset + length):
            if position != _ZERO:
                found.add(start, stop)
        for part in self._unsaved.overlapping(offset, offset + length):
            found.add(part.offset, part.end)
        return iter(found)

    def close(self) -> None:
        """Close the image."""
        if self._image is not None:
            self._image.close()

"""On-disk structures as named fields.

A structure is a `NamedTuple` whose fields say where they are, each of one value of `struct`:

    class MmpBlock(NamedTuple):
        magic: Annotated[int, Field(0x0, "I")]
        checksum: Annotated[int, Field(0x3FC, "I")]

    MMP_BLOCK = StructLayout(MmpBlock, "<")

A field is named as in its specification, without that one's prefix (`s_`, `bg_`, `i_`). Only the
fields that are used need to be there. Unpacking costs one call of a compiled `struct.Struct` and
one tuple; loops over thousands of small records use `StructLayout.struct` and name its results.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_type_hints

from nbdproxy.disks.device import ReadableDevice

S = TypeVar("S", bound=tuple[Any, ...])


class Field(NamedTuple):
    """Where a field is: bytes from the structure's start, and the format of its one value."""

    offset: int
    format: str


class StructLayout(Generic[S]):
    """A structure's fields, in ascending order of their offsets, none overlapping another.

    struct  all fields, compiled; its values are in the order of the fields
    size    bytes up to the end of the last field, or as many as were given
    """

    def __init__(self, kind: type[S], order: Literal["<", ">"], size: int = 0) -> None:
        """Compile the fields of a `NamedTuple`; `order` is little or big endian, as in `struct`."""
        hints = get_type_hints(kind, include_extras=True)
        places: dict[str, Field] = {name: hint.__metadata__[0] for name, hint in hints.items()}
        self._fields = {name: struct.Struct(order + at.format) for name, at in places.items()}
        self._spans = {
            name: slice(at.offset, at.offset + self._fields[name].size)
            for name, at in places.items()
        }
        layout, end = str(order), 0
        for name, at in places.items():
            assert at.offset >= end, f"{kind.__name__}.{name} overlaps the field before it"
            layout += _padding(at.offset - end) + at.format
            end = at.offset + self._fields[name].size
        self.struct = struct.Struct(layout + _padding(size - end))
        self.size = self.struct.size
        self._make: Callable[[tuple[Any, ...]], S] = partial(tuple.__new__, kind)

    def unpack_from(self, raw: bytes, start: int = 0) -> S:
        """Return all fields of the structure that begins at `start`; struct.error if it is cut."""
        return self._make(self.struct.unpack_from(raw, start))

    def iter_unpack(self, raw: bytes) -> Iterator[S]:
        """Yield the structures that fill `raw` one behind the other; struct.error for a rest."""
        return map(self._make, self.struct.iter_unpack(raw))

    def offset(self, name: str) -> int:
        """Return where a field is, in bytes from the structure's start."""
        return self._spans[name].start

    def span(self, name: str) -> slice:
        """Return the bytes of a field as a slice of the structure."""
        return self._spans[name]

    def read_field(self, device: ReadableDevice, start: int, name: str) -> Any:
        """Return one field of the structure at `start` of a device; only its bytes are read."""
        field = self._fields[name]
        return field.unpack(device.pread(start + self.offset(name), field.size))[0]

    def zeroed(self, raw: bytes, name: str) -> bytes:
        """Return a structure with one field zero, as a checksum counts itself."""
        result = bytearray(raw)
        result[self._spans[name]] = bytes(self._fields[name].size)
        return bytes(result)


def _padding(length: int) -> str:
    return f"{length}x" if length > 0 else ""

"""Where the rules of a policy match on one disk: their ranges, regions and files, looked up in it.

Looked up once, when a policy comes into force; the disk is read. Raises PolicyError, with file and
key path, for a place that the disk does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nbdproxy.disks.device import ReadableDevice
from nbdproxy.errors import FilesystemError, ImageError, PolicyError
from nbdproxy.extents import Extent, ExtentSet
from nbdproxy.oracles.ext4.layout import file_extents, journal_extents, metadata_extents
from nbdproxy.oracles.partitions import Slice, slices
from nbdproxy.policy.model import Policy, Rule, Survivors

_NEEDS_METADATA = frozenset({Survivors.METADATA, Survivors.DATA})
_EXT4: dict[str, Callable[[ReadableDevice], list[Extent]]] = {
    "journal": journal_extents,
    "metadata": metadata_extents,
}


@dataclass(frozen=True, slots=True)
class RulePlaces:
    """The places of each rule, by its name; None is everywhere.

    `metadata` is what an adversary among `Survivors` takes for metadata.
    """

    of_rules: Mapping[str, list[Extent] | None] = field(default_factory=dict)
    metadata: ExtentSet = field(default_factory=ExtentSet)

    def of(self, rule: Rule) -> list[Extent] | None:
        """Return where a rule matches."""
        return self.of_rules[rule.name]


NOWHERE = RulePlaces()
"""The places of a policy without rules."""


def find_places(policy: Policy, disk: ReadableDevice) -> RulePlaces:
    """Look up all places of a policy on a disk; blocks."""
    try:
        found = {rule.name: _of_rule(rule, disk) for rule in policy.rules}
        return RulePlaces(found, _metadata(policy, disk))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageError(f"the places of policy {policy.name} cannot be read: {reason}") from None


def _metadata(policy: Policy, disk: ReadableDevice) -> ExtentSet:
    metadata = ExtentSet()
    if policy.cut.survives in _NEEDS_METADATA:
        where = f"{policy.name}: cut.survives"
        for extent in _region(where, f"ext4:metadata{_only_partition(disk)}", disk):
            metadata.add(extent.offset, extent.end)
    return metadata


def _of_rule(rule: Rule, disk: ReadableDevice) -> list[Extent] | None:
    when = rule.when
    if when.region is not None:
        return _region(f"{rule.where}.region", when.region, disk)
    if when.file is not None:
        return _file(f"{rule.where}.file", when.file, disk)
    if when.ranges is None:
        return None
    found = [Extent.between(low, min(high, disk.size)) for low, high in when.ranges]
    if all(extent.length <= 0 for extent in found):
        raise PolicyError(
            f"{rule.where}.range: lies behind the end of the disk, which has {disk.size} bytes, so "
            "the rule can never strike; choose another"
        )
    return [extent for extent in found if extent.length > 0]


def _region(where: str, text: str, disk: ReadableDevice) -> list[Extent]:
    kind, _, rest = text.partition(":")
    if kind == "partition":
        part = _slice(where, rest, disk)
        return [Extent(part.offset, part.length)]
    what, _, number = rest.partition(":")
    if kind != "ext4" or what not in _EXT4:
        raise PolicyError(
            f'{where}: {text!r} is no region; write "partition:1", "ext4:journal", '
            '"ext4:metadata" or, in a partition, "ext4:journal:1"'
        )
    return _inside(where, number or "0", disk, _EXT4[what])


def _file(where: str, text: str, disk: ReadableDevice) -> list[Extent]:
    number, colon, path = text.partition(":")
    if not colon or not number.isdecimal():
        number, path = "0", text
    if not path.startswith("/"):
        raise PolicyError(f'{where}: {text!r} is no path from the top, such as "/etc/passwd"')
    return _inside(where, number, disk, lambda device: file_extents(device, path))


def _inside(
    where: str,
    number: str,
    disk: ReadableDevice,
    find: Callable[[ReadableDevice], list[Extent]],
) -> list[Extent]:
    part = _slice(where, number, disk)
    try:
        found = find(part.device)
    except FilesystemError as error:
        raise PolicyError(f"{where}: {part.name}: {error}") from None
    if not found:
        raise PolicyError(f"{where}: it has no blocks on the disk, so the rule can never strike")
    return [Extent(part.offset + extent.offset, extent.length) for extent in found]


def _slice(where: str, number: str, disk: ReadableDevice) -> Slice:
    parts = [part for part in slices(disk) if part.is_direct]
    for part in parts:
        if str(part.number) == number:
            return part
    known = ", ".join(str(part.number) for part in parts[1:]) or "none"
    raise PolicyError(f"{where}: there is no partition {number}; the disk has: {known}")


def _only_partition(disk: ReadableDevice) -> str:
    """Return how a region names the only partition, if there is one."""
    parts = [part for part in slices(disk) if part.is_direct]
    return f":{parts[1].number}" if len(parts) == 2 else ""
